"""GFNet: the global filter against its definition, and the models as timm tests its own."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

import vmkd_fx as vx
from tests.checks import assert_computes_the_same
from tests.models import images
from vmkd_fx.errors import ModelError
from vmkd_fx.graph.shapes import parameter_count
from vmkd_fx.models.gfnet import GFNetPyramid
from vmkd_fx.models.global_filter import global_filter

SIZE = 64
SMALL = {
    "gfnet_ti": {"embed_dim": 12, "depth": 3, "patch_size": 8},
    "gfnet_h_ti": {"embed_dim": (8, 12, 16, 20), "depth": (1, 1, 2, 1)},
}
NAMES = list(SMALL)


def small(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{"img_size": SIZE, "num_classes": 10, **SMALL[name], **options})


def by_definition(x: Tensor, weight: Tensor) -> Tensor:
    """The whole complex spectrum, its right half mirrored from the left, and the real part of its inverse."""
    height, width = x.shape[1:3]
    half = torch.view_as_complex(weight)
    rows = (-torch.arange(height)) % height
    columns = [width - v for v in range(half.shape[1], width)]
    whole = torch.cat([half, half[rows][:, columns].conj()], 1)
    return torch.fft.ifft2(torch.fft.fft2(x, dim=(1, 2)) * whole, dim=(1, 2)).real


@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (4, 7), (5, 8), (1, 3), (3, 1)])
def test_the_filter_is_its_definition_also_where_the_spectrum_is_not_hermitian(grid: tuple[int, int]) -> None:
    torch.manual_seed(1)
    height, width = grid
    x = torch.randn(2, height, width, 3, dtype=torch.float64)
    weight = torch.randn(height, width // 2 + 1, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(global_filter(x, weight), by_definition(x, weight), rtol=0, atol=1e-12)


def test_gradients_of_the_filter() -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(global_filter, (x, weight))


def test_a_shift_of_the_image_shifts_the_result() -> None:
    """A product of spectra is a circular convolution, if the weight is the spectrum of a real kernel."""
    torch.manual_seed(3)
    x, kernel = torch.randn(2, 6, 4, 3, dtype=torch.float64), torch.randn(6, 4, 3, dtype=torch.float64)
    weight = torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1)))
    moved = global_filter(x.roll((2, 1), (1, 2)), weight)
    torch.testing.assert_close(moved, global_filter(x, weight).roll((2, 1), (1, 2)), rtol=0, atol=1e-12)
    summed = sum(kernel[i, j] * x.roll((i, j), (1, 2)) for i in range(6) for j in range(4))
    torch.testing.assert_close(global_filter(x, weight), summed, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_transformed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x, weight = torch.randn(2, 7, 6, 3).to(dtype), torch.randn(7, 4, 3, 2).to(dtype)
    found = global_filter(x, weight)
    assert found.dtype is dtype
    assert torch.equal(found, global_filter(x.float(), weight.float()).to(dtype))


def test_float64_stays_float64() -> None:
    x = torch.randn(1, 4, 4, 2, dtype=torch.float64)
    weight = torch.zeros(4, 3, 2, 2, dtype=torch.float64)
    weight[..., 0] = 1
    torch.testing.assert_close(global_filter(x, weight), x, rtol=0, atol=1e-15)


def test_the_filter_is_one_node_and_a_graph_cast_to_half_computes_it_in_float32() -> None:
    model = small("gfnet_ti")
    graph = vx.trace(copy.deepcopy(model)).eval().bfloat16()
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(global_filter) == 3
    assert not any("fft" in str(target) for target in targets)
    x = images(size=SIZE).bfloat16()
    with torch.no_grad():
        assert torch.equal(graph(x), model.eval().bfloat16()(x))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gfnet_ti", 7_511_784),
        ("gfnet_xs", 15_985_768),
        ("gfnet_s", 24_869_608),
        ("gfnet_b", 43_120_616),
        ("gfnet_h_ti", 15_085_096),
        ("gfnet_h_s", 32_162_632),
        ("gfnet_h_b", 53_744_200),
    ],
)
def test_sizes(name: str, count: int) -> None:
    """The paper: 7 (cut, not rounded), 16, 25, 43, 15, 32 and 54 M."""
    with torch.device("meta"):
        model = timm.create_model(name)
    assert parameter_count(model) == count
    assert model.default_cfg["input_size"] == (3, 224, 224)


def test_two_kinds_of_blocks() -> None:
    flat, pyramid = small("gfnet_ti"), small("gfnet_h_ti")
    assert flat.blocks[0].gamma is None
    assert [stage[0].gamma[0].item() for stage in pyramid.blocks] == [pytest.approx(1e-3)] * 4
    assert GFNetPyramid(64, layer_scale=None).blocks[0][0].gamma is None


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradients(name: str) -> None:
    model = small(name, drop_rate=0.1, drop_path_rate=0.1, proj_drop_rate=0.1, pos_drop_rate=0.1).train()
    logits = model(images(size=SIZE))
    assert logits.shape == (2, 10)
    logits.square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", NAMES)
def test_heads(name: str) -> None:
    model, x = small(name).eval(), images(size=SIZE)
    tokens = model.forward_features(x)
    assert (
        tokens.shape[2] == model.num_features == model.head_hidden_size == model.get_classifier().in_features
    )
    pooled = model.forward_head(tokens, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model.get_classifier()(pooled), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), tokens)
    without = small(name, num_classes=0).eval()
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    assert torch.equal(without(x), pooled)


@pytest.mark.parametrize("name", NAMES)
def test_one_channel_and_other_sizes(name: str) -> None:
    model = small(name, in_chans=1, img_size=(64, 96)).eval()
    assert model(torch.randn(2, 1, 64, 96)).shape == (2, 10)
    with pytest.raises(AssertionError, match="height"):
        model(torch.randn(2, 1, 96, 96))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("indices", [None, (0, 2), (1,)])
def test_features_only(name: str, indices: tuple[int, ...] | None) -> None:
    chosen = {} if indices is None else {"out_indices": indices}
    model, x = small(name, features_only=True, **chosen).eval(), images(size=SIZE)
    found = model(x)
    assert len(found) == (len(indices) if indices else {"gfnet_ti": 3, "gfnet_h_ti": 4}[name])
    info = model.feature_info
    shapes = [(2, c, SIZE // r, SIZE // r) for c, r in zip(info.channels(), info.reduction(), strict=True)]
    assert [tuple(feature.shape) for feature in found] == shapes
    _, expected = small(name).eval().forward_intermediates(x, indices=list(info.out_indices))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", NAMES)
def test_intermediates(name: str) -> None:
    model, x = small(name).eval(), images(size=SIZE)
    last, found = model.forward_intermediates(x, output_fmt="NLC", norm=True)
    assert torch.equal(last, model.forward_features(x)) and torch.equal(found[-1], last)
    one = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    assert len(one) == 1 and one[0].shape[1] == model.feature_info[0]["num_chs"]
    with pytest.raises(ModelError, match="'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    plain, x = small(name), images(size=SIZE)
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model(x).square().mean().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_the_model_in_both_modes(name: str) -> None:
    model = small(name, drop_rate=0.1, drop_path_rate=0.2)
    graph = vx.trace(copy.deepcopy(model))
    assert_computes_the_same(graph, model, images(size=SIZE))
    blocks = vx.anatomy(graph).blocks
    assert len(blocks) == {"gfnet_ti": 3, "gfnet_h_ti": 5}[name]
    assert all([branch.mixing.mixes for branch in block.branches] == [True] for block in blocks)


def test_it_compiles_without_a_break() -> None:
    model, x = small("gfnet_ti").eval(), images(size=SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_learning_rates_by_layer(name: str) -> None:
    model = small(name)
    layers = list(group_parameters(model, model.group_matcher()).values())
    assert sorted(key for layer in layers for key in layer) == sorted(
        key for key, _ in model.named_parameters()
    )
    assert "pos_embed" in layers[0] and model.no_weight_decay() == {"pos_embed"}
    blocks = {"gfnet_ti": 3, "gfnet_h_ti": 5}[name]
    assert len(layers) == blocks + 2  # the stem before, the classifier behind
    assert (
        len(group_parameters(model, model.group_matcher(coarse=True)))
        == {"gfnet_ti": 5, "gfnet_h_ti": 6}[name]
    )


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gfnet_h_ti", {"depth": (1, 1, 1)}, "4, 3 and 4 stages"),
        ("gfnet_h_ti", {"img_size": 16}, "at least 32x32"),
        ("gfnet_ti", {"img_size": (64, 4)}, "at least 8x8"),
        ("gfnet_ti", {"global_pool": "max"}, "'avg'"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        small(name, **options)


def test_the_start_of_the_weights() -> None:
    torch.manual_seed(0)
    model = timm.create_model("gfnet_h_ti", img_size=SIZE)
    deviations = [block.filter.complex_weight.std().item() for stage in model.blocks for block in stage]
    assert all(math.isclose(value, 0.02, rel_tol=0.1) for value in deviations)
    assert 0.015 < model.pos_embed.std() < 0.025
