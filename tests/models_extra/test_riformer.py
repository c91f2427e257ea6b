"""RIFormer, IdentityFormer and RandFormer: the affine mixer, the paper's sizes, and the models as timm tests
its own.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

import vmkd_fx as vx
from tests.checks import assert_computes_the_same
from tests.models import images
from tests.slow import rest_slow
from vmkd_fx.errors import ModelError
from vmkd_fx.graph.shapes import multiply_adds, parameter_count
from vmkd_fx.graph.verify import relative_error
from vmkd_fx.models.affine_mixer import AffineMixer, merged_into_norm
from vmkd_fx.models.riformer import RandomMixing, RIFormer, checkpoint_filter_fn

SIZE = 64
NAMES = ("riformer_s12", "identityformer_s12", "randformer_s12")
MIXES = {
    "riformer_s12": [False] * 5,
    "identityformer_s12": [False] * 5,
    "randformer_s12": [False, False, True, True, True],
}


def small(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "num_classes": 10, **options}
    if name == "randformer_s12":
        sizes = {"img_size": SIZE, **sizes}
    return timm.create_model(name, **sizes)


def with_random_weights(model: nn.Module) -> nn.Module:
    """All parameters drawn, those of norms and scales around one; float64."""
    generator = torch.Generator().manual_seed(1)
    model.double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * drawn + (parameter.ndim == 1 and "bias" not in key))
    return model.eval()


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_affine_adds_nothing_at_first_and_is_equation_1(channels_last: bool) -> None:
    torch.manual_seed(0)
    shape = (2, 7, 5) if channels_last else (2, 5, 3, 4)
    n, mixer = torch.randn(shape, dtype=torch.float64), AffineMixer(5, channels_last).double()
    assert not mixer(n).any()
    nn.init.normal_(mixer.scale)
    nn.init.normal_(mixer.shift)
    by_channel = n.movedim(-1 if channels_last else 1, 0)
    found = mixer(n).movedim(-1 if channels_last else 1, 0)
    for channel in range(5):
        expected = mixer.scale[channel] * by_channel[channel] + mixer.shift[channel] - by_channel[channel]
        assert torch.equal(found[channel], expected)


@pytest.mark.parametrize(
    ("norm", "shape", "channels_last"),
    [
        (nn.GroupNorm(1, 6), (2, 6, 3, 4), False),
        (nn.LayerNorm(6), (2, 5, 6), True),
        (nn.BatchNorm2d(6).eval(), (2, 6, 3, 4), False),
    ],
)
def test_equation_4(norm: nn.Module, shape: tuple[int, ...], channels_last: bool) -> None:
    torch.manual_seed(0)
    norm, mixer = norm.double(), AffineMixer(6, channels_last).double()
    for parameter in (*norm.parameters(), *mixer.parameters()):
        nn.init.normal_(parameter)
    x = torch.randn(shape, dtype=torch.float64)
    expected = mixer(norm(x))
    before = norm.weight.detach().clone()
    weight, bias = merged_into_norm(norm.weight, norm.bias, mixer.scale, mixer.shift)
    assert torch.equal(norm.weight, before)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "millions", "at_224", "at_384", "printed"),
    rest_slow(
        [
            ("riformer_s12", 11.915, 1.823, 5.355, (12, 1.8, 5.4)),
            ("riformer_s24", 21.389, 3.413, 10.029, (21, 3.4, 10.0)),
            ("riformer_s36", 30.863, 5.003, 14.702, (31, 5.0, 14.7)),
            ("riformer_m36", 56.173, 8.802, 25.865, (56, 8.8, 25.9)),
            ("riformer_m48", 73.473, 11.591, 34.061, (73, 11.6, 34.1)),
        ],
        2,
    ),
)
def test_table_6(
    name: str, millions: float, at_224: float, at_384: float, printed: tuple[float, float, float]
) -> None:
    """The table counts what is deployed, so the affines are merged; in training they are s and t a mixer."""
    with torch.device("meta"):
        training, deployed = timm.create_model(name), timm.create_model(name, token_mixers=nn.Identity)
    parameters = parameter_count(deployed) / 1e6
    assert (round(parameters, 3), round(parameters)) == (millions, printed[0])
    for size, expected, rounded in ((224, at_224, printed[1]), (384, at_384, printed[2])):
        giga = multiply_adds(deployed, (3, size, size)) / 1e9
        assert (round(giga, 3), round(giga, 1)) == (expected, rounded)
    affines = sum(2 * m.scale.numel() for m in training.modules() if isinstance(m, AffineMixer))
    assert parameter_count(training) - parameter_count(deployed) == affines > 0


def test_sizes_of_the_baselines() -> None:
    """The paper: 11.9 M and 1.8 G; 11.9 + 0.2 M, the latter frozen, and 1.9 G."""
    identity, random = timm.create_model("identityformer_s12"), timm.create_model("randformer_s12")
    assert parameter_count(identity) == parameter_count(random) == 11_891_712
    assert sum(buffer.numel() for buffer in random.buffers()) == 6 * 196**2 + 2 * 49**2 == 235_298
    giga = [multiply_adds(model, (3, 224, 224)) / 1e9 for model in (identity, random)]
    assert [round(value, 1) for value in giga] == [1.8, 1.9]


def test_a_poolformer_teacher_fits_but_for_the_mixers() -> None:
    with torch.device("meta"):
        teacher, student = timm.create_model("poolformer_m36"), timm.create_model("riformer_m36")
    own = {key: value.shape for key, value in student.state_dict().items()}
    theirs = {key: value.shape for key, value in teacher.state_dict().items()}
    assert theirs.items() <= own.items()
    assert all(".token_mixer." in key for key in own.keys() - theirs.keys())


def test_norms_and_scales_are_poolformers() -> None:
    for name, start in (("riformer_s12", 1e-5), ("riformer_s24", 1e-5), ("riformer_s36", 1e-6)):
        model = timm.create_model(name, dims=(8, 8, 8, 8))
        norms = [part for part in model.modules() if isinstance(part, nn.GroupNorm)]
        assert len(norms) == 2 * sum(len(stage.blocks) for stage in model.stages) + 1
        assert {(norm.num_groups, norm.eps) for norm in norms} == {(1, 1e-5)}
        assert model.stages[0].blocks[0].layer_scale1.scale[0].item() == pytest.approx(start)


def test_the_last_norm_sees_the_map_and_not_its_mean() -> None:
    model, x = with_random_weights(small("riformer_s12")), images(size=SIZE, dtype=torch.float64)
    features = model.forward_features(x)
    mean, deviation = (
        f((1, 2, 3), keepdim=True)
        for f in (features.mean, lambda *a, **k: features.var(*a, correction=0, **k))
    )
    normed = (features - mean) / (deviation + 1e-5).sqrt()
    norm = model.head.norm
    pooled = normed.mean((2, 3)) * norm.weight + norm.bias
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)


def test_lowering_merges_every_affine() -> None:
    model, x = with_random_weights(small("riformer_s12")), images(size=SIZE, dtype=torch.float64)
    lowered = vx.lower(vx.trace(model, input_size=(3, SIZE, SIZE)))
    left = [node.name for node in lowered.graph.nodes if node.name.startswith(("mul", "sub", "addcmul"))]
    assert left == []
    step = next(step for step in vx.ledger(lowered).steps if step.name == "channel_affine")
    assert step.matched == 10 and step.error is not None and step.error < 1e-12
    with torch.no_grad():
        assert relative_error(model(x), lowered(x)) < 1e-12


def test_the_deployed_form_holds_the_merged_norms() -> None:
    model, x = with_random_weights(small("riformer_s12")), images(size=SIZE, dtype=torch.float64)
    deployed = small("riformer_s12", token_mixers=nn.Identity).double().eval()
    weights = {key: value for key, value in model.state_dict().items() if ".token_mixer." not in key}
    for path, part in model.named_modules():
        if isinstance(part, AffineMixer):
            norm = path.replace("token_mixer", "norm1")
            given = weights[f"{norm}.weight"], weights[f"{norm}.bias"]
            weights[f"{norm}.weight"], weights[f"{norm}.bias"] = merged_into_norm(
                *given, part.scale.detach(), part.shift.detach()
            )
    deployed.load_state_dict(weights)
    with torch.no_grad():
        assert 0 < relative_error(model(x), deployed(x)) < 1e-12


@pytest.mark.parametrize("form", ["training", "deployed"])
def test_the_authors_checkpoints_load(form: str) -> None:
    """Their names: `network` counts stages and downsamplings, and the affine is a depthwise convolution."""
    deployed = form == "deployed"
    model = with_random_weights(small("riformer_s12", **({"token_mixers": nn.Identity} if deployed else {})))
    theirs = {}
    for key, value in model.state_dict().items():
        for index in range(4):
            key = key.replace(f"stages.{index}.downsample.conv", f"network.{2 * index - 1}.proj")
            key = key.replace(f"stages.{index}.blocks", f"network.{2 * index}")
        if key.endswith("token_mixer.scale"):
            value = value.view(-1, 1, 1, 1)
        key = key.replace("token_mixer.scale", "token_mixer.affine.weight")
        key = key.replace("token_mixer.shift", "token_mixer.affine.bias")
        key = key.replace("layer_scale1.scale", "layer_scale_1").replace(
            "layer_scale2.scale", "layer_scale_2"
        )
        key = key.replace("norm1", "norm_reparam") if deployed else key
        key = key.replace("stem.conv", "patch_embed.proj").replace("head.norm", "norm6")
        theirs[key if key.startswith("head.") else f"backbone.{key}"] = value
    found = checkpoint_filter_fn(theirs, model)
    assert list(found) == list(model.state_dict())
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    assert checkpoint_filter_fn(found, model) == found


def test_random_mixing_is_frozen_and_averages_all_tokens() -> None:
    torch.manual_seed(0)
    mixer = RandomMixing((3, 4)).double()
    assert not list(mixer.parameters()) and list(mixer.state_dict()) == ["random_matrix"]
    matrix = mixer.random_matrix
    torch.testing.assert_close(matrix.sum(1), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-6)
    assert matrix.min() > 0 and not torch.equal(matrix, RandomMixing((3, 4)).random_matrix.double())
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    expected = torch.stack([(matrix[m].view(3, 4) * x).sum((2, 3)) for m in range(12)], -1).view(x.shape)
    torch.testing.assert_close(mixer(x), expected, rtol=0, atol=1e-12)


def test_random_mixing_stands_in_the_later_stages_alone() -> None:
    model = small("randformer_s12", img_size=(64, 96))
    mixers = [block.token_mixer for stage in model.stages for block in stage.blocks]
    assert [type(mixer) for mixer in mixers] == [*[nn.Identity] * 2, *[RandomMixing] * 3]
    assert [mixer.grid_size for mixer in mixers[2:]] == [(4, 6), (4, 6), (2, 3)]
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 10)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 96, 96))


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradients(name: str) -> None:
    model = small(name, drop_rate=0.1, drop_path_rate=0.1, proj_drop_rate=0.1).train()
    logits = model(images(size=SIZE))
    assert logits.shape == (2, 10)
    logits.square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", NAMES)
def test_heads(name: str) -> None:
    model, x = small(name).eval(), images(size=SIZE)
    features = model.forward_features(x)
    assert features.shape == (2, 20, 2, 2)
    assert model.num_features == model.head_hidden_size == model.get_classifier().in_features == 20
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, 20) and torch.equal(model.get_classifier()(pooled), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    without = small(name, num_classes=0).eval()
    without.load_state_dict(model.state_dict())
    assert torch.equal(without(x), pooled)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape


@pytest.mark.parametrize("name", NAMES)
def test_one_channel(name: str) -> None:
    assert small(name, in_chans=1)(torch.randn(2, 1, SIZE, SIZE)).shape == (2, 10)


@pytest.mark.parametrize("name", ["riformer_s12", "identityformer_s12"])
def test_images_of_any_size_pass(name: str) -> None:
    assert small(name)(torch.randn(2, 3, 50, 71)).shape == (2, 10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("indices", [None, (0, 2), (1,)])
def test_features_only(name: str, indices: tuple[int, ...] | None) -> None:
    chosen = {} if indices is None else {"out_indices": indices}
    model, x = small(name, features_only=True, **chosen).eval(), images(size=SIZE)
    found, info = model(x), model.feature_info
    shapes = [(2, c, SIZE // r, SIZE // r) for c, r in zip(info.channels(), info.reduction(), strict=True)]
    assert [tuple(feature.shape) for feature in found] == shapes
    assert len(found) == (len(indices) if indices else 4)
    expected = small(name).eval().forward_intermediates(x, list(indices or range(4)), intermediates_only=True)
    assert all(map(torch.equal, found, expected))


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
    graph = vx.trace(copy.deepcopy(model), input_size=(3, SIZE, SIZE))
    assert_computes_the_same(graph, model, images(size=SIZE))
    blocks = vx.anatomy(graph).blocks
    assert [any(branch.mixing.mixes for branch in block.branches) for block in blocks] == MIXES[name]


@pytest.mark.parametrize("name", rest_slow(NAMES))
def test_it_compiles_without_a_break(name: str) -> None:
    model, x = small(name).eval(), images(size=SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))


def hidden_widths(model: nn.Module) -> list[int]:
    return [block.mlp.fc1.out_channels for stage in model.stages for block in stage.blocks]


def test_other_widths_of_the_mlps() -> None:
    x: Tensor = images(size=SIZE)
    model = RIFormer((1, 1), (8, 12), mlp_ratios=(2, 3), num_classes=3, proj_drop_rate=0.1)
    assert hidden_widths(model) == [16, 36] and model(x).shape == (2, 3)
    assert hidden_widths(RIFormer((1, 2), (8, 12), num_classes=3)) == [32, 48, 48]
    assert model.stages[0].blocks[0].mlp.drop1.p == 0.1
    assert 0.01 < model.stages[1].blocks[0].mlp.fc1.weight.std() < 0.03


@pytest.mark.parametrize("options", [{"depths": (1, 1)}, {"mlp_ratios": (4, 4)}, {"dims": (8,) * 5}])
def test_other_numbers_of_stages_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="stages; give one of each a stage"):
        small("riformer_s12", **options)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="pool_sise"):
        small("riformer_s12", pool_sise=3)
