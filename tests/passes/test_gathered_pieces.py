"""Pieces as gathers: the same numbers, and no shape arithmetic in TensorRT's network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.deploy.conftest import needs_builder
from tests.models import small
from tests.passes.lowering import lowered_by, normal, operators, rewritten
from tests.passes.test_attention_pass import (
    AttentionNet,
    Behind,
    Channels,
    Selected,
)
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.deploy.tensorrt import Network
from vmkd_fx.graph.verify import logits_of, probe_images, relative_error
from vmkd_fx.passes.cleanup.constants import CONSTANTS
from vmkd_fx.passes.cleanup.views import VIEWS
from vmkd_fx.passes.engine.attention import ATTENTION
from vmkd_fx.passes.engine.gathered_pieces import GATHERED_PIECES
from vmkd_fx.passes.engine.heads import SPLIT_HEADS
from vmkd_fx.passes.engine.score_scale import SCORE_SCALE

SIZE = (3, 16, 16)
BEFORE = (ATTENTION, SPLIT_HEADS, VIEWS, SCORE_SCALE)


Cut = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    one, other = x.split(8, 1)
    return one, other


def sliced(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[:, :8, :, 1:], x[:, 8:, :, :-1]


class Gated(nn.Module):
    """A convolution's channels, one part times the other."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.cut = cut
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.cut(self.stem(x))
        return self.head((one * other.sigmoid()).mean((2, 3)))


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("make", [AttentionNet, Selected, Behind, Channels])
def test_every_cut_of_heads_is_a_gather(make: type[AttentionNet], target: str) -> None:
    error, module, record = lowered_by(make(), *BEFORE, GATHERED_PIECES, target=target, size=SIZE)
    assert error < 1e-12
    assert len(record.sites) == 1
    found = operators(module)
    assert found["index_select"] == 3 and not found["split"]


def test_the_same_numbers_move() -> None:
    """What is left is the order in which a product over values that lie together is summed."""
    before, _ = rewritten(normal(small("deit")), CONSTANTS, *BEFORE, target="tensorrt-rtx")
    after, record = rewritten(before, GATHERED_PIECES, target="tensorrt-rtx")
    assert record.sites
    images = probe_images(before, 3)
    assert relative_error(logits_of(before, images), logits_of(after, images)) < 1e-14
    assert not rewritten(after, GATHERED_PIECES, target="tensorrt-rtx")[1].sites


@pytest.mark.parametrize("target", ["torch", "onnxruntime"])
def test_other_targets_keep_their_split(target: str) -> None:
    _, module, record = lowered_by(AttentionNet(), *BEFORE, GATHERED_PIECES, target=target, size=SIZE)
    assert not record.sites and not operators(module)["index_select"]


@pytest.mark.parametrize(("cut", "gathers"), [(split, 2), (sliced, 4)])
def test_channels_of_a_convolution(cut: Cut, gathers: int) -> None:
    error, module, record = lowered_by(Gated(cut), VIEWS, GATHERED_PIECES, target="tensorrt-rtx")
    assert error < 1e-12
    found = operators(module)
    assert record.sites and found["index_select"] == gathers and not found["split"] and not found["slice"]


@needs_builder
@pytest.mark.engine
def test_tensorrt_needs_no_arithmetic_for_them(tmp_path: Path) -> None:
    """The bounds of a split's pieces are put together by concatenations of shapes."""
    import tensorrt_rtx as trt

    _, module, _ = lowered_by(AttentionNet(), *BEFORE, GATHERED_PIECES, target="tensorrt-rtx", size=SIZE)
    export(module.float(), tmp_path / "m.onnx", input_size=SIZE)
    network = Network("tensorrt-rtx", tmp_path / "m.onnx")
    kinds = [network._network.get_layer(index).type for index in range(network.layers)]
    assert kinds.count(trt.LayerType.GATHER) == 3
    assert not {trt.LayerType.CONCATENATION, trt.LayerType.SLICE, trt.LayerType.CAST} & set(
        kinds[: kinds.index(trt.LayerType.SOFTMAX)]
    )
