"""Involution and RedNet: the definition, odd sizes, memory, refusals, and what timm asks of its models."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models_extra import like_timm
from tests.models_extra.like_timm import PeakMemory, images
from tests.slow import rest_slow
from vmkd_fx.errors import ModelError
from vmkd_fx.graph.shapes import multiply_adds, parameter_count
from vmkd_fx.models import rednet
from vmkd_fx.models.involution import Involution2d, involve, involve_unfolded

small = partial(timm.create_model, "rednet26", layers=(1, 1, 2, 1), stem_width=32, channels=(16, 16, 32, 32))


def by_definition(x: Tensor, kernels: Tensor, size: int, stride: int) -> Tensor:
    """The sum written out place by place."""
    batch, channels, height, width = x.shape
    shared = channels * size**2 // kernels.shape[1]
    result = torch.zeros(batch, channels, *kernels.shape[2:], dtype=x.dtype)
    for c in range(channels):
        for i in range(result.shape[2]):
            for j in range(result.shape[3]):
                for u in range(size):
                    for v in range(size):
                        row, column = stride * i + u - size // 2, stride * j + v - size // 2
                        if 0 <= row < height and 0 <= column < width:
                            weight = kernels[:, (c // shared * size + u) * size + v, i, j]
                            result[:, c, i, j] += weight * x[:, c, row, column]
    return result


@pytest.mark.parametrize(
    ("size", "stride", "height", "width"),
    [(3, 1, 4, 5), (7, 1, 3, 5), (3, 2, 6, 5), (5, 3, 7, 4), (1, 2, 3, 2)],
)
@pytest.mark.parametrize("add_up", ["_by_place", "_by_column", "unfolded"])
def test_every_way_of_adding_up_is_the_definition(
    size: int, stride: int, height: int, width: int, add_up: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: add_up == "_by_column")
    x = images(2, 4, height, width).double()
    kernels = images(2, 2 * size**2, -(-height // stride), -(-width // stride)).double()
    found = (involve_unfolded if add_up == "unfolded" else involve)(x, kernels, size, stride)
    torch.testing.assert_close(found, by_definition(x, kernels, size, stride), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_definition() -> None:
    x, kernels = images(1, 2, 3, 4).double(), images(1, 9, 2, 2).double()
    inputs = (x.requires_grad_(), kernels.requires_grad_())
    assert torch.autograd.gradcheck(lambda *args: involve(*args, 3, 2), inputs)
    assert torch.autograd.gradgradcheck(lambda *args: involve(*args, 3, 2), inputs)


@pytest.mark.parametrize(("height", "width", "stride"), [(7, 7, 2), (8, 5, 2), (1, 3, 2), (7, 8, 3)])
def test_last_cells_that_the_stride_does_not_fill_are_averaged_over_what_is_there(
    height: int, width: int, stride: int
) -> None:
    layer, x = Involution2d(16, 3, stride).double().eval(), images(2, 16, height, width).double()
    cells = torch.stack(
        [
            torch.stack([part.mean((2, 3)) for part in row.split(stride, dim=3)], dim=-1)
            for row in x.split(stride, dim=2)
        ],
        dim=2,
    )
    kernels = layer.span(layer.act(layer.norm(layer.reduce(cells))))
    assert kernels.shape[2:] == (-(-height // stride), -(-width // stride))
    torch.testing.assert_close(layer.kernels(x), kernels, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), by_definition(x, kernels, 3, stride), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 24}, "24 channels in groups of 16.*take 32 channels"),
        ({"channels": 8}, "take 16 channels"),
        ({"kernel_size": 4}, "kernel_size=4 has no centre; take 3 or 5"),
        ({"stride": 0}, "each must be at least 1"),
        ({"channels": 2, "group_channels": 2}, "reduction=4 makes its kernels from no channel"),
    ],
)
def test_what_is_no_involution_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Involution2d(**{"channels": 16, "kernel_size": 3, **arguments})


@pytest.mark.parametrize(("training", "share"), [(False, 10), (True, 8)])
def test_memory_is_a_small_share_of_unfolding(training: bool, share: int) -> None:
    x, kernels = images(2, 64, 28, 28), images(2, 4 * 49, 28, 28)
    peaks = []
    for operation in (involve, involve_unfolded):
        given = [tensor.clone().requires_grad_(training) for tensor in (x, kernels)]
        with PeakMemory() as meter:
            result = operation(*given, 7)
            if training:
                result.sum().backward()
        peaks.append(meter.peak)
        del result, given
    assert peaks[1] > 2 * 49 * x.nbytes, "the meter misses the unfolded copy"
    assert share * peaks[0] < peaks[1], f"{peaks[0]} bytes against {peaks[1]}"


@pytest.mark.parametrize("stride", rest_slow([1, 2]))
def test_an_involution_exports(stride: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    like_timm.assert_exports(Involution2d(16, 3, stride), images(3, 16, 7, 9), tmp_path / "involution.onnx")


@pytest.mark.parametrize(
    ("depth", "millions", "parameters"),
    [
        (26, 9.2, 9_233_166),
        (38, 12.4, 12_386_986),
        (50, 15.5, 15_540_806),
        (101, 25.6, 25_652_950),
        (152, 34.0, 33_984_582),
    ],
)
def test_sizes_are_the_papers(depth: int, millions: float, parameters: int) -> None:
    model = like_timm.created(f"rednet{depth}")
    assert parameter_count(model) == parameters
    # The paper cuts RedNet-101's 25.65 off instead of rounding it.
    assert abs(parameters / 1e6 - millions) < 0.06
    like_timm.assert_configured(model)


def test_multiply_adds_of_rednet26_are_those_of_its_convolutions_and_classifier() -> None:
    assert multiply_adds(like_timm.created("rednet26"), (3, 224, 224)) == 1_650_831_360


def test_forward() -> None:
    like_timm.assert_forward(small, channels=128, dim=1)


@pytest.mark.parametrize("size", [(33, 47), (64, 50), (97, 31)])
def test_any_image_size(size: tuple[int, int]) -> None:
    model = small(num_classes=10)
    assert model.forward_features(images(2, 3, *size)).shape[2:] == tuple(-(-n // 32) for n in size)
    assert model(images(2, 3, *size)).shape == (2, 10)


def test_training() -> None:
    like_timm.assert_trains(partial(small, zero_init_last=False))


def test_blocks_begin_as_their_shortcuts() -> None:
    block = small().layer3[1].eval()
    x = images(2, 128, 4, 4)
    assert torch.equal(block(x), F.relu(x))


def test_features() -> None:
    like_timm.assert_features(small, dim=1)


def test_trace() -> None:
    like_timm.assert_traces(partial(small, zero_init_last=False))


def test_half() -> None:
    like_timm.assert_runs_in_half(small)


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    model, x = small(zero_init_last=False).eval(), images(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_weights_load_under_the_authors_names() -> None:
    model = small(num_classes=10)
    theirs = {"backbone." + name: value for name, value in model.state_dict().items() if "head" not in name}
    for ours, name in (
        *[("stem.conv1.", "stem.0.conv."), ("stem.bn1.", "stem.0.bn."), ("stem.involution.", "stem.1.")],
        *[("stem.bn2.", "stem.2."), ("stem.conv2.", "stem.4.conv."), ("stem.bn3.", "stem.4.bn.")],
        *[(".reduce.", ".conv1.conv."), (".norm.", ".conv1.bn."), (".span.", ".conv2.conv.")],
    ):
        theirs = {key.replace(ours, name): value for key, value in theirs.items()}
    theirs |= {f"head.fc.{part}": getattr(model.head.fc, part) for part in ("weight", "bias")}
    other = small(num_classes=10)
    other.load_state_dict(rednet.checkpoint_filter_fn({"state_dict": theirs}, other))
    assert torch.equal(other.eval()(images(1, 3, 32, 32)), model.eval()(images(1, 3, 32, 32)))
    assert rednet.checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()
