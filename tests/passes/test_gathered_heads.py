"""Heads as gathers: the same numbers, no shape arithmetic in TensorRT's network, no other split touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.deploy.conftest import needs_builder
from tests.models import small
from tests.passes.lowering import lowered_by, normal, operators, rewritten
from tests.passes.test_attention_pass import (
    HEADS,
    TOKENS,
    WIDTH,
    AttentionNet,
    Behind,
    Channels,
    Heads,
    Selected,
)
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.deploy.tensorrt import Network
from vmkd_fx.graph.verify import logits_of, probe_images, relative_error
from vmkd_fx.passes.cleanup.constants import CONSTANTS
from vmkd_fx.passes.cleanup.views import VIEWS
from vmkd_fx.passes.engine.attention import ATTENTION
from vmkd_fx.passes.engine.gathered_heads import GATHERED_HEADS
from vmkd_fx.passes.engine.heads import SPLIT_HEADS
from vmkd_fx.passes.engine.score_scale import SCORE_SCALE

SIZE = (3, 16, 16)
BEFORE = (ATTENTION, SPLIT_HEADS, VIEWS, SCORE_SCALE)


class ReadWhole(AttentionNet):
    """The heads are read before they are cut, too."""

    def cut(self, x: torch.Tensor) -> Heads:
        heads = self.qkv(x).reshape(-1, TOKENS, 3 * HEADS, WIDTH).transpose(1, 2)
        self.whole = heads.mean((1, 3))
        q, k, v = heads.split(HEADS, 1)
        return q, k, v

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v + self.whole[:, None, :, None]


class Gated(nn.Module):
    """A split of a convolution's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.stem(x).split(8, 1)
        return self.head((one * other.sigmoid()).mean((2, 3)))


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("make", [AttentionNet, Selected, Behind, Channels])
def test_every_cut_of_heads_is_a_gather(make: type[AttentionNet], target: str) -> None:
    error, module, record = lowered_by(make(), *BEFORE, GATHERED_HEADS, target=target, size=SIZE)
    assert error < 1e-12
    assert len(record.sites) == 1
    found = operators(module)
    assert found["index_select"] == 3 and not found["split"]


def test_the_same_numbers_move() -> None:
    """What is left is the order in which a product over values that lie together is summed."""
    before, _ = rewritten(normal(small("deit")), CONSTANTS, *BEFORE, target="tensorrt-rtx")
    after, record = rewritten(before, GATHERED_HEADS, target="tensorrt-rtx")
    assert record.sites
    images = probe_images(before, 3)
    assert relative_error(logits_of(before, images), logits_of(after, images)) < 1e-14
    assert not rewritten(after, GATHERED_HEADS, target="tensorrt-rtx")[1].sites


@pytest.mark.parametrize("target", ["torch", "onnxruntime"])
def test_other_targets_keep_their_split(target: str) -> None:
    _, module, record = lowered_by(AttentionNet(), *BEFORE, GATHERED_HEADS, target=target, size=SIZE)
    assert not record.sites and not operators(module)["index_select"]


def test_other_splits_stay() -> None:
    error, module, record = lowered_by(Gated(), GATHERED_HEADS, target="tensorrt-rtx")
    assert error < 1e-12
    assert not record.sites and not record.refusals and operators(module)["split"] == 1


def test_heads_that_are_read_whole_stay() -> None:
    error, module, record = lowered_by(ReadWhole(), GATHERED_HEADS, target="tensorrt-rtx", size=SIZE)
    assert error < 1e-12
    (refusal,) = record.refusals.values()
    assert "is read whole, too" in refusal.reason and operators(module)["split"] == 1


@needs_builder
@pytest.mark.engine
def test_tensorrt_needs_no_arithmetic_for_them(tmp_path: Path) -> None:
    """The bounds of a split's pieces are put together by concatenations of shapes."""
    import tensorrt_rtx as trt

    _, module, _ = lowered_by(AttentionNet(), *BEFORE, GATHERED_HEADS, target="tensorrt-rtx", size=SIZE)
    export(module.float(), tmp_path / "m.onnx", input_size=SIZE)
    network = Network("tensorrt-rtx", tmp_path / "m.onnx")
    kinds = [network._network.get_layer(index).type for index in range(network.layers)]
    assert kinds.count(trt.LayerType.GATHER) == 3
    assert not {trt.LayerType.CONCATENATION, trt.LayerType.SLICE, trt.LayerType.CAST} & set(
        kinds[: kinds.index(trt.LayerType.SOFTMAX)]
    )
