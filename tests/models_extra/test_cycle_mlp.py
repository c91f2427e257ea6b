"""Cycle FC and CycleMLP: the definition at borders, memory, refusals, and what timm asks of its models."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vmkd_fx as vx
from tests.models_extra import like_timm
from tests.models_extra.like_timm import PeakMemory, images
from tests.slow import rest_slow
from vmkd_fx.errors import ModelError
from vmkd_fx.graph.shapes import multiply_adds, parameter_count
from vmkd_fx.models import cycle_mlp
from vmkd_fx.models.cycle_blocks import CycleMixer
from vmkd_fx.models.cycle_fc import CycleFC

small = partial(timm.create_model, "cycle_mlp_b1", layers=(1, 1, 2, 1), embed_dims=(8, 12, 16, 24))


def by_definition(layer: CycleFC, x: Tensor) -> Tensor:
    """The sum written out place by place and channel by channel."""
    size, axis = max(layer.kernel_size), 2 if layer.kernel_size[1] > 1 else 1
    shifted = torch.zeros_like(x)
    for c in range(x.shape[-1]):
        shift = (c + size // 2) % size - size // 2
        for place in range(x.shape[axis]):
            if 0 <= place + shift < x.shape[axis]:
                shifted.select(axis, place)[..., c] = x.select(axis, place + shift)[..., c]
    y = shifted @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel_size", "channels"),
    [((1, 3), 8), ((3, 1), 8), ((1, 7), 16), ((5, 1), 7), ((1, 4), 9), ((2, 1), 6), ((1, 9), 4), ((1, 1), 5)],
)
@pytest.mark.parametrize("space", [(5, 6), (2, 3), (1, 1)])
def test_a_cycle_fc_is_the_definition(
    kernel_size: tuple[int, int], channels: int, space: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    layer, x = CycleFC(channels, 6, kernel_size, bias).double(), images(2, *space, channels).double()
    if bias:
        nn.init.normal_(layer.bias)
    torch.testing.assert_close(layer(x), by_definition(layer, x), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_definition() -> None:
    layer, x = CycleFC(5, 3, (1, 3)).double(), images(1, 2, 3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    layer.zero_grad()
    layer(x).square().sum().backward()
    weight, found = layer.weight, layer.weight.grad.clone()
    (expected,) = torch.autograd.grad(by_definition(layer, x).square().sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [(3, 3), (2, 3), (1,), (0, 1)])
def test_kernels_along_two_axes_or_none_are_refused(kernel_size: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"it shifts along one axis; give \(1, K\)"):
        CycleFC(8, 8, kernel_size)


def test_memory_is_less_than_unfoldings() -> None:
    layer, x = CycleFC(64, 64, (1, 7)), images(2, 28, 28, 64)
    channels_first = x.permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        with PeakMemory() as ours:
            layer(x)
        with PeakMemory() as unfolded:
            F.unfold(channels_first, (1, 7), padding=(0, 3))
    assert unfolded.peak >= 7 * x.nbytes, "the meter misses the unfolded copy"
    assert 2 * ours.peak < unfolded.peak, f"{ours.peak} bytes against {unfolded.peak}"


def test_the_mixer_weighs_its_branches_per_image_and_channel() -> None:
    torch.manual_seed(0)
    mixer, x = CycleMixer(6).double(), images(2, 4, 5, 6).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter)
    branches = [mixer.sfc_h(x), mixer.sfc_w(x), mixer.mlp_c(x)]
    scores = mixer.reweight(sum(branches).mean((1, 2)))
    expected = torch.zeros_like(x)
    for b in range(2):
        for c in range(6):
            share = scores[b, 3 * c : 3 * c + 3].softmax(0)
            expected[b, ..., c] = sum(s * y[b, ..., c] for s, y in zip(share, branches, strict=True))
    torch.testing.assert_close(mixer(x), mixer.proj(expected), rtol=1e-12, atol=1e-12)
    assert mixer.sfc_h.kernel_size == (1, 3) and mixer.sfc_w.kernel_size == (3, 1)


@pytest.mark.parametrize(
    ("variant", "millions", "parameters"),
    [
        (1, 15.2, 15_155_400),
        (2, 26.8, 26_802_504),
        (3, 38.4, 38_385_720),
        (4, 51.8, 51_796_552),
        (5, 75.7, 75_747_280),
    ],
)
def test_sizes_are_the_papers(variant: int, millions: float, parameters: int) -> None:
    model = like_timm.created(f"cycle_mlp_b{variant}")
    assert parameter_count(model) == parameters
    assert round(parameters / 1e6, 1) == millions
    like_timm.assert_configured(model)


@pytest.mark.parametrize(("variant", "billions"), rest_slow([(1, 2.131), (2, 3.890)]))
def test_multiply_adds(variant: int, billions: float) -> None:
    found = multiply_adds(like_timm.created(f"cycle_mlp_b{variant}"), (3, 224, 224))
    assert round(found / 1e9, 3) == billions


def test_forward() -> None:
    like_timm.assert_forward(small, channels=24, dim=3)


@pytest.mark.parametrize("size", [(33, 47), (64, 50), (97, 31), (3, 5)])
def test_any_image_size(size: tuple[int, int]) -> None:
    assert small(num_classes=10)(images(2, 3, *size)).shape == (2, 10)


def test_training() -> None:
    like_timm.assert_trains(small)


def test_features() -> None:
    like_timm.assert_features(small, dim=3)


def test_pruned_to_a_stage() -> None:
    model = small(num_classes=10).eval()
    x = images(2, 3, 64, 64)
    _, expected = model.forward_intermediates(x)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert model.num_features == 16
    assert torch.equal(model(x).permute(0, 3, 1, 2), expected[2])


def test_trace() -> None:
    like_timm.assert_traces(small)


def test_anatomy_finds_every_mixer() -> None:
    found = vx.anatomy(vx.trace(small(num_classes=10)))
    assert [block.layout for block in found.blocks] == ["NHWC"] * 5
    assert all([branch.mixing.mixes for branch in block.branches] == [True, False] for block in found.blocks)


def test_half() -> None:
    like_timm.assert_runs_in_half(small)


def test_export(tmp_path: Path) -> None:
    model = small(num_classes=10, layers=(1, 1), embed_dims=(8, 12), mlp_ratios=(2, 2))
    like_timm.assert_exports(model, images(3, 3, 64, 64), tmp_path / "cycle_mlp.onnx")


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    model, x = small(num_classes=10).eval(), images(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_weights_load_under_the_authors_names() -> None:
    model = small(num_classes=10)
    theirs = {}
    for name, value in model.state_dict().items():
        for stage in range(4):
            name = name.replace(f"stages.{stage}.blocks.", f"network.{2 * stage}.")
            name = name.replace(f"stages.{stage}.downsample.", f"network.{2 * stage - 1}.")
        name = name.replace(".token_mixer.", ".attn.").replace("head.fc.", "head.")
        if ".sfc_" in name and name.endswith(".weight"):
            theirs[name.replace(".weight", ".offset")] = torch.zeros(1, 2 * value.shape[1], 1, 1)
            value = value[..., None, None]
        theirs[name] = value
    other = small(num_classes=10)
    other.load_state_dict(cycle_mlp.checkpoint_filter_fn({"model": theirs}, other))
    x = images(1, 3, 32, 32)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert cycle_mlp.checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()
