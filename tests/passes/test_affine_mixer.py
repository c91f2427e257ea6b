"""Affine mixers: in the place of token mixers, in every layout, and merged into the norm."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import GroupNorm1
from timm.models.metaformer import MetaFormer, Pooling
from torch import nn

import vmkd_fx as vx
from tests.checks import assert_same_module, fingerprint
from tests.models import images
from tests.models import small as fresh
from tests.slow import rest_slow
from vmkd_fx.errors import MatchError, ReceiptError, RecipeError
from vmkd_fx.graph.replace import replacements
from vmkd_fx.graph.shapes import parameter_count
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import randomise_, relative_error
from vmkd_fx.models.affine_mixer import AffineMixer
from vmkd_fx.passes.affine_mixer import AffineConfig, copy_teacher_weights, inject_affine_mixers
from vmkd_fx.passes.std_tokens import StdConfig, inject_std_tokens

PLACES = {
    "poolformer": [f"stages.{i}.blocks.0.token_mixer" for i in range(4)],
    "deit": ["blocks.0.attn", "blocks.1.attn"],
    "mixer": ["blocks.0.mlp_tokens", "blocks.1.mlp_tokens"],
    "resmlp": ["blocks.0.linear_tokens", "blocks.1.linear_tokens"],
}


def small(family: str, **options: object) -> nn.Module:
    """Fresh heads are zero, and behind a zero nothing shows."""
    return randomise_(fresh(family, **options))


def metaformer(mixer: type[nn.Module]) -> nn.Module:
    model = MetaFormer(
        depths=(1, 2, 1, 1),
        dims=(8, 16, 24, 32),
        token_mixers=mixer,
        norm_layers=GroupNorm1,
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        layer_scale_init_values=0.1,
        res_scale_init_values=None,
        use_mlp_head=False,
        num_classes=10,
        drop_path_rate=0.1,
    )
    model.default_cfg = {"input_size": (3, 64, 64)}
    return model


def with_affines(model: nn.Module) -> TracedModule:
    """Their scales and shifts are random: fresh ones add nothing."""
    return randomise_(inject_affine_mixers(vx.trace(model), AffineConfig()))


def affines_of(graph: nn.Module) -> dict[str, AffineMixer]:
    return {path: part for path, part in graph.named_modules() if isinstance(part, AffineMixer)}


def images_for(graph: TracedModule, count: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return images(count, graph.info.need_input_size()[1], dtype)


@pytest.mark.parametrize(("layout", "axis"), [("NLC", 2), ("NHWC", 3), ("NCHW", 1)])
def test_the_affine_is_equation_1(layout: str, axis: int) -> None:
    mixer = AffineMixer(5, channels_last=layout != "NCHW")
    x = torch.randn(2, 5, 5) if layout == "NLC" else torch.randn(2, 5, 5, 5)
    assert not mixer(x).any(), "s = 1 and t = 0 add nothing"
    nn.init.normal_(mixer.scale)
    nn.init.normal_(mixer.shift)
    for channel in range(5):
        n, found = x.select(axis, channel), mixer(x).select(axis, channel)
        torch.testing.assert_close(found, mixer.scale[channel] * n + mixer.shift[channel] - n)


@pytest.mark.parametrize("family", PLACES)
def test_the_affine_stands_where_the_mixer_stood(family: str) -> None:
    student = small(family)
    before = fingerprint(student)
    graph = inject_affine_mixers(vx.trace(student), AffineConfig())
    assert_same_module(student, before)

    paths = tuple(PLACES[family])
    assert tuple(affines_of(graph)) == paths == replacements(graph)[0].paths
    keys = [key for key in student.state_dict() if not key.startswith(paths)]
    assert [key for key in graph.state_dict() if not key.startswith(paths)] == keys
    added = [key for key in graph.state_dict() if key.startswith(paths)]
    assert added == [f"{path}.{name}" for path in paths for name in ("scale", "shift")]
    assert not any(branch.mixing.mixes for block in vx.anatomy(graph).blocks for branch in block.branches)


@pytest.mark.parametrize("family", PLACES)
def test_it_computes_what_the_model_computes_with_an_affine_in_that_place(family: str) -> None:
    """The affine as a part of the model's own code, norm, layer scale and drop path around it."""
    student = small(family).double().eval()
    graph = with_affines(student).eval()
    own = copy.deepcopy(student)
    own.load_state_dict(graph.state_dict(), strict=False)
    for path, affine in affines_of(graph).items():
        holder, _, name = path.rpartition(".")
        inner = Transposed(affine) if family in ("mixer", "resmlp") else Takes(affine)
        setattr(own.get_submodule(holder), name, inner)
    x = images_for(graph, dtype=torch.float64)
    torch.testing.assert_close(graph(x), own(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(graph(x), student(x), rtol=1e-3)


class Takes(nn.Module):
    """An affine that takes what a mixer takes besides: a mask."""

    def __init__(self, affine: AffineMixer) -> None:
        super().__init__()
        self.affine = affine

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return self.affine(x)


class Transposed(Takes):
    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return self.affine(x.transpose(1, 2)).transpose(1, 2)


def test_a_fresh_affine_adds_nothing_to_the_stream() -> None:
    student = small("poolformer").eval()
    graph = inject_affine_mixers(vx.trace(student), AffineConfig()).eval()
    found = vx.anatomy(graph)
    tapped = vx.tap(graph, {f"{i}": f"block {i} branch 0" for i in range(len(found.blocks))}).eval()
    outputs = tapped(images_for(graph))
    assert all(not outputs[f"taps/{i}"].any() for i in range(len(found.blocks)))


def test_lowering_leaves_no_affine_and_as_many_parameters_as_identities() -> None:
    graph = with_affines(metaformer(Pooling))
    lowered = vx.lower(graph)
    assert not affines_of(lowered)
    assert not any("token_mixer" in str(node.target) for node in lowered.graph.nodes)
    steps = {step.name: step for step in vx.ledger(lowered).steps}
    assert steps["channel_affine"].error < 1e-12
    assert steps["lowered"].error < 1e-12

    identities = vx.lower(randomise_(metaformer(nn.Identity)))
    assert parameter_count(lowered) == parameter_count(identities)
    ours, theirs = (
        [node.target for node in module.graph.nodes if node.op == "call_function"]
        for module in (lowered, identities)
    )
    assert ours == theirs, "node for node"
    affines = sum(2 * affine.scale.numel() for affine in affines_of(graph).values())
    assert parameter_count(graph) - affines == parameter_count(metaformer(nn.Identity))


@pytest.mark.parametrize("family", ["deit", "mixer"])
def test_affines_merge_into_layer_norms_too(family: str) -> None:
    lowered = vx.lower(with_affines(small(family)))
    assert not affines_of(lowered)
    assert vx.ledger(lowered).steps[-1].error < 1e-12


@torch.no_grad()
def test_one_shift_that_is_lost_would_be_seen() -> None:
    """Negative control for the bounds above: Eq. 4 without t in one block."""
    graph = with_affines(metaformer(Pooling)).double().eval()
    x = images_for(graph, dtype=torch.float64)
    expected = graph(x)
    next(iter(affines_of(graph).values())).shift.zero_()
    assert relative_error(expected, graph(x)) > 1e-6


@pytest.mark.parametrize(
    ("name", "count", "dims"),
    rest_slow(
        [
            ("poolformer_s12", 12, {3}),
            ("convformer_s18", 18, {3}),
            ("caformer_s18", 18, {3, 1}),
            ("swin_tiny_patch4_window7_224", 12, {1}),
            ("deit_tiny_distilled_patch16_224", 12, {1}),
            ("beit_base_patch16_224", 12, {1}),
        ],
        3,
    ),
)
def test_every_mixer_of_timms_models_in_its_layout(name: str, count: int, dims: set[int]) -> None:
    """`dims`: of the scale as it is broadcast, 3 where channels come first."""
    with torch.device("meta"):
        student = timm.create_model(name)
    graph = inject_affine_mixers(vx.trace(student), AffineConfig())
    affines = affines_of(graph)
    assert len(affines) == len(vx.anatomy(graph).blocks) == count
    assert {len(affine.shape) for affine in affines.values()} == dims
    assert not any(branch.mixing.mixes for block in vx.anatomy(graph).blocks for branch in block.branches)


@pytest.mark.parametrize("family", PLACES)
def test_it_trains_and_every_handle_keeps_it(family: str) -> None:
    graph = with_affines(small(family))
    x = images_for(graph, 4)
    graph.train()(x).square().mean().backward()
    assert all(a.scale.grad.any() and a.shift.grad.any() for a in affines_of(graph).values())
    expected = graph.eval()(x)
    copies = [vx.trace(graph), copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), vx.strip(graph)]
    for other in copies:
        assert replacements(other) == replacements(graph)
        assert torch.equal(other.eval()(x), expected)


def test_tokens_come_off_and_the_affines_stay() -> None:
    graph = with_affines(small("mixer")).eval()
    stripped = vx.strip(inject_std_tokens(graph, StdConfig())).eval()
    assert stripped.code == graph.code
    assert list(stripped.state_dict()) == list(graph.state_dict())
    with pytest.raises(ReceiptError, match="replace mixers first"):
        inject_affine_mixers(inject_std_tokens(vx.trace(small("mixer")), StdConfig()), AffineConfig())


def test_chosen_blocks_alone() -> None:
    graph = inject_affine_mixers(vx.trace(small("deit")), AffineConfig(blocks=(-1,)))
    assert list(affines_of(graph)) == ["blocks.1.attn"]
    assert [block.branches[0].mixing.mixes for block in vx.anatomy(graph).blocks] == [True, False]
    with pytest.raises(MatchError, match="block 1: branch 0 works on channels only"):
        inject_affine_mixers(graph, AffineConfig(blocks=(1,)))
    assert list(affines_of(inject_affine_mixers(graph, AffineConfig()))) == PLACES["deit"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("convnext_atto", "no branch is left for the channels alone"),
        ("resnet18", "3x3 convolution, and no branch is left for the channels alone"),
        ("gmlp_ti16_224", "linear over tokens, and no branch is left for the channels alone"),
        ("swinv2_tiny_window8_256", "starts without a norm, into which its affine could merge"),
    ],
)
def test_students_whose_mixers_do_not_stand_alone_are_told_so(name: str, found: str) -> None:
    with torch.device("meta"):
        student = timm.create_model(name)
    with pytest.raises(MatchError, match=found):
        inject_affine_mixers(vx.trace(student), AffineConfig())


def test_settings_that_mean_nothing() -> None:
    with pytest.raises(RecipeError, match="names no block"):
        AffineConfig(blocks=())


def test_the_teachers_weights_but_not_its_mixers() -> None:
    teacher = randomise_(fresh("deit", num_classes=7), seed=1)
    student = inject_affine_mixers(vx.trace(small("deit")), AffineConfig())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    given = fingerprint(teacher)
    copied, rest = copy_teacher_weights(student, teacher)
    assert_same_module(teacher, given)

    after, theirs = student.state_dict(), teacher.state_dict()
    assert {*copied, *dict(rest)} == after.keys()
    assert all(torch.equal(after[name], theirs[name]) for name in copied)
    assert all(torch.equal(after[name], before[name]) for name in dict(rest))
    assert dict(rest) == {
        **{
            f"blocks.{i}.attn.{name}": "belongs to a mixer that was replaced"
            for i in (0, 1)
            for name in ("scale", "shift")
        },
        "head.weight": "the teacher's is (7, 24), the student's (10, 24)",
        "head.bias": "the teacher's is (7,), the student's (10,)",
    }


def test_what_the_teacher_lacks_is_listed() -> None:
    student = inject_affine_mixers(vx.trace(metaformer(Pooling)), AffineConfig())
    copied, rest = copy_teacher_weights(student, vx.trace(small("deit")))
    assert not copied
    assert dict(rest)["stem.conv.weight"] == "the teacher has none of this name"
