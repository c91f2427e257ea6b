"""Circulant mixers: the operation against matrices, and their place in Mixer, ResMLP and gMLP."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from tests.checks import assert_same_module, fingerprint
from tests.models import images, renamed
from tests.models import small as fresh
from tests.slow import rest_slow
from vmkd_fx.errors import MatchError, ModelError, ReceiptError, RecipeError
from vmkd_fx.graph.replace import Replaced, replacements
from vmkd_fx.graph.shapes import parameter_count
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import randomise_
from vmkd_fx.passes.circulant_mixer import (
    CirculantConfig,
    CirculantMixer,
    circulant,
    circulant_by_matrices,
    dense_circulant,
    inject_circulant_mixers,
    project,
)
from vmkd_fx.passes.std_tokens import StdConfig, inject_std_tokens

PLACES = {"mixer": "mlp_tokens", "resmlp": "linear_tokens", "gmlp": "mlp_channels.gate.proj"}


def small(family: str, **options: object) -> nn.Module:
    """Fresh heads are zero, and behind a zero nothing shows."""
    return randomise_(fresh(family, **options))


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def mixers_of(graph: nn.Module) -> dict[str, CirculantMixer]:
    return {path: part for path, part in graph.named_modules() if isinstance(part, CirculantMixer)}


@pytest.mark.parametrize(("tokens", "channels", "groups"), [(8, 6, 3), (9, 6, 6), (7, 4, 1), (1, 4, 2)])
def test_the_fourier_way_is_the_sum_of_the_paper(tokens: int, channels: int, groups: int) -> None:
    """Against y[b, i, c] = sum_j w[c % G, (j - i) % N] x[b, j, c], written as loops."""
    x, w = random(2, tokens, channels), random(groups, tokens)
    expected = torch.zeros_like(x)
    for i in range(tokens):
        for c in range(channels):
            expected[:, i, c] = sum(w[c % groups, (j - i) % tokens] * x[:, j, c] for j in range(tokens))
    torch.testing.assert_close(circulant(x, w), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(circulant_by_matrices(x, w), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [4, 5])
def test_gradients(tokens: int) -> None:
    x, w = random(2, tokens, 6).requires_grad_(), random(3, tokens).requires_grad_()
    assert torch.autograd.gradcheck(circulant, (x, w))
    assert torch.autograd.gradgradcheck(circulant, (x, w))


def test_tokens_that_move_round_move_the_result_round() -> None:
    x, w = random(2, 9, 6), random(3, 9)
    moved = circulant(x.roll(4, 1), w)
    torch.testing.assert_close(moved, circulant(x, w).roll(4, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, w = random(2, 9, 6, dtype=dtype), random(3, 9, dtype=dtype)
    found = circulant(x, w)
    assert found.dtype is dtype
    assert torch.equal(found, circulant(x.float(), w.float()).to(dtype))


def test_projection_is_the_inverse_on_circulants_and_the_nearest_elsewhere() -> None:
    w = random(4, 7)
    torch.testing.assert_close(project(dense_circulant(w), 4), w, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(project(dense_circulant(w)[2], 3), w[2].expand(3, -1), rtol=1e-14, atol=1e-14)

    dense = random(12, 7, 7)
    nearest = project(dense, 4).requires_grad_()
    apart = (dense - dense_circulant(nearest).repeat(3, 1, 1)).square().sum()
    slope = torch.autograd.grad(apart, nearest)[0]
    assert slope.abs().max() < 1e-12, "least squares have no slope at their minimum"


@pytest.mark.parametrize("family", PLACES)
def test_the_mixer_stands_where_the_old_one_stood(family: str) -> None:
    student = small(family)
    before = fingerprint(student)
    graph = inject_circulant_mixers(vx.trace(student), CirculantConfig(groups=4))
    assert_same_module(student, before)

    paths = tuple(f"blocks.{i}.{PLACES[family]}" for i in (0, 1))
    assert tuple(mixers_of(graph)) == paths
    assert replacements(graph) == (
        Replaced("circulant", {"groups": 4, "blocks": None, "initialise": "random"}, paths),
    )
    keys = [key for key in student.state_dict() if not key.startswith(paths)]
    assert [key for key in graph.state_dict() if not key.startswith(paths)] == keys
    assert [key for key in graph.state_dict() if key.startswith(paths)] == [
        f"{path}.weight" for path in paths
    ]
    assert all(graph.state_dict()[f"{path}.weight"].shape == (4, 16) for path in paths)
    for name, parameter in student.named_parameters():
        assert name.startswith(paths) or graph.get_parameter(name) is parameter


@pytest.mark.parametrize("family", PLACES)
def test_it_computes_what_the_student_computes_with_matrices_in_that_place(family: str) -> None:
    """The old mixer as a layer that multiplies by the dense circulants, in the model's own code."""
    student = small(family, drop_rate=0.0, drop_path_rate=0.0).double().eval()
    graph = inject_circulant_mixers(vx.trace(student), CirculantConfig()).eval()
    by_matrices = copy.deepcopy(student)
    for path, mixer in mixers_of(graph).items():
        holder, _, name = path.rpartition(".")
        setattr(by_matrices.get_submodule(holder), name, Matrices(mixer.weight))
    x = images(2, dtype=torch.float64)
    torch.testing.assert_close(graph(x), by_matrices(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(graph(x), student(x), rtol=1e-3)


class Matrices(nn.Module):
    """Channels first: (B, C, N) to (B, C, N)."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return circulant_by_matrices(x.transpose(1, 2), self.weight).transpose(1, 2)


@pytest.mark.parametrize("family", PLACES)
def test_names_of_classes_decide_nothing(family: str) -> None:
    graph = inject_circulant_mixers(vx.trace(renamed(small(family))), CirculantConfig())
    assert list(mixers_of(graph)) == [f"blocks.{i}.{PLACES[family]}" for i in (0, 1)]


@pytest.mark.parametrize("family", PLACES)
def test_the_anatomy_still_finds_the_mixing_branch(family: str) -> None:
    student = vx.trace(small(family))
    graph = inject_circulant_mixers(student, CirculantConfig())
    found, before = vx.anatomy(graph), vx.anatomy(student)
    assert [(b.path, b.tokens, b.channels) for b in found.blocks] == [
        (b.path, b.tokens, b.channels) for b in before.blocks
    ]
    assert [[br.mixing.mixes for br in b.branches] for b in found.blocks] == [
        [br.mixing.mixes for br in b.branches] for b in before.blocks
    ]


def test_a_gated_token_mlp_is_replaced_whole() -> None:
    with torch.device("meta"):
        student = timm.create_model("gmixer_12_224")
    graph = inject_circulant_mixers(vx.trace(student), CirculantConfig())
    assert list(mixers_of(graph)) == [f"blocks.{index}.mlp_tokens" for index in range(12)]


def test_chosen_blocks_alone() -> None:
    graph = inject_circulant_mixers(vx.trace(small("mixer")), CirculantConfig(blocks=(-1,)))
    assert list(mixers_of(graph)) == ["blocks.1.mlp_tokens"]
    assert "blocks.0.mlp_tokens.fc1.weight" in graph.state_dict()


@pytest.mark.parametrize("family", ["resmlp", "gmlp"])
def test_projected_circulants_leave_a_circulant_student_as_it_was(family: str) -> None:
    student = small(family, drop_rate=0.0, drop_path_rate=0.0).double().eval()
    for index in (0, 1):
        linear = student.get_submodule(f"blocks.{index}.{PLACES[family]}")
        with torch.no_grad():
            linear.weight.copy_(dense_circulant(random(1, 16))[0])
            linear.bias.zero_()
    graph = inject_circulant_mixers(vx.trace(student), CirculantConfig(initialise="project")).eval()
    x = images(2, dtype=torch.float64)
    torch.testing.assert_close(graph(x), student(x), rtol=1e-12, atol=1e-12)


def test_two_layers_cannot_be_projected() -> None:
    with pytest.raises(MatchError, match="is Linear, GELU, Linear, which is no one matrix") as refused:
        inject_circulant_mixers(vx.trace(small("mixer")), CirculantConfig(initialise="project"))
    assert "initialise='random'" in str(refused.value)


@pytest.mark.parametrize("family", PLACES)
def test_it_trains_and_every_handle_keeps_it(family: str) -> None:
    graph = inject_circulant_mixers(vx.trace(small(family)), CirculantConfig())
    x = images(4)
    graph.train()(x).square().mean().backward()
    assert all(mixer.weight.grad.any() for mixer in mixers_of(graph).values())
    expected = graph.eval()(x)
    copies: list[TracedModule] = [
        vx.trace(graph),
        copy.deepcopy(graph),
        pickle.loads(pickle.dumps(graph)),
        vx.strip(graph),
    ]
    for other in copies:
        assert replacements(other) == replacements(graph)
        assert torch.equal(other.eval()(x), expected)


def test_tokens_come_off_and_the_mixers_stay() -> None:
    graph = inject_circulant_mixers(vx.trace(small("mixer")), CirculantConfig()).eval()
    stripped = vx.strip(inject_std_tokens(graph, StdConfig(positions=("2/3", -1)))).eval()
    assert stripped.code == graph.code
    assert list(stripped.state_dict()) == list(graph.state_dict())
    assert replacements(stripped) == replacements(graph)
    assert torch.equal(stripped(images()), graph(images()))


def test_a_graph_with_tokens_is_refused() -> None:
    graph = inject_std_tokens(vx.trace(small("mixer")), StdConfig())
    with pytest.raises(ReceiptError, match="std was added to it before; replace mixers first"):
        inject_circulant_mixers(graph, CirculantConfig())


def test_a_model_that_holds_one_is_traced_around_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mixer = nn.LayerNorm(8), CirculantMixer(16, 8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mixer(self.norm(x))

    model = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.Flatten(2), Transposed(), Block(), nn.Linear(8, 2))
    graph = vx.trace(model, input_size=(3, 32, 32)).eval()
    assert [str(n.target) for n in graph.graph.nodes if "mixer" in str(n.target)] == ["3.mixer"]
    assert torch.equal(graph(images()), model.eval()(images()))


class Transposed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def test_it_compiles_as_one_graph() -> None:
    graph = inject_circulant_mixers(vx.trace(small("resmlp")), CirculantConfig()).eval()
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), graph(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "groups", "before", "after"),
    rest_slow(
        [
            ("mixer_b16_224", 8, 59.11, 57.32),
            ("resmlp_36_224", 8, 44.31, 42.97),
            ("resmlp_36_224", 1, 44.31, 42.92),
            ("resmlp_36_224", 384, 44.31, 45.62),
        ],
        2,
    ),
)
def test_sizes_of_ccs_tables_3_to_5(name: str, groups: int, before: float, after: float) -> None:
    """Millions of parameters without the head of 1000 classes."""
    with torch.device("meta"):
        student = timm.create_model(name, num_classes=0)
    graph = inject_circulant_mixers(vx.trace(student), CirculantConfig(groups=groups))
    assert parameter_count(student) / 1e6 == pytest.approx(before, abs=5e-3)
    assert parameter_count(graph) / 1e6 == pytest.approx(after, abs=5e-3)


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("deit", "blocks 0 to 1: branch 0 mixes tokens by attention, branch 1 works on channels only"),
        ("poolformer", "blocks 0 to 3: branch 0 mixes tokens by pooling"),
    ],
)
def test_students_without_such_mixers_are_told_what_they_have(family: str, found: str) -> None:
    with pytest.raises(MatchError, match=found):
        inject_circulant_mixers(vx.trace(small(family)), CirculantConfig())


def test_groups_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(RecipeError, match="5 groups do not divide 24 channels evenly; 4 or 6 would"):
        inject_circulant_mixers(vx.trace(small("mixer")), CirculantConfig(groups=5))
    with pytest.raises(RecipeError, match="48 groups do not divide 24 channels evenly; 24 would"):
        CirculantMixer(16, 24, 48)


@pytest.mark.parametrize("settings", [{"groups": 0}, {"initialise": "zeros"}, {"blocks": ()}])
def test_settings_that_mean_nothing(settings: dict) -> None:
    with pytest.raises(RecipeError):
        CirculantConfig(**settings)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ModelError, match="do not fit"):
        circulant(random(2, 8, 6), random(3, 9))
    with pytest.raises(ModelError, match="square"):
        project(random(3, 4), 1)
    with pytest.raises(ModelError, match="3 matrices cannot be shared out to 2 groups"):
        project(random(3, 4, 4), 2)


class Net(nn.Module):
    """Residual blocks over 16 patches of 8 channels, behind a class token if asked."""

    def __init__(self, *blocks: nn.Module, class_token: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8)) if class_token else None
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class TokensBy(nn.Module):
    def __init__(self, tokens: nn.Module) -> None:
        super().__init__()
        self.norm, self.tokens, self.channels = nn.LayerNorm(8), tokens, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norm(x).mT).mT
        return x + self.channels(x)


class Flat(nn.Module):
    """Both layers of the token-mixing MLP are parts of the block itself, or plain parameters of it."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(16, 4), nn.Linear(4, 16)
        self.fc3, self.functional = nn.Linear(8, 8), functional

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x).permute(0, 2, 1)
        if self.functional:
            weights = (self.fc1.weight, self.fc2.weight)
            y = nn.functional.linear(nn.functional.linear(y, weights[0]).relu(), weights[1])
        else:
            y = self.fc2(self.fc1(y).relu())
        x = x + y.permute(0, 2, 1).contiguous()
        return x + self.fc3(x)


def replaced(model: nn.Module, **settings: object) -> TracedModule:
    return inject_circulant_mixers(
        vx.trace(model, input_size=(3, 32, 32)), CirculantConfig(groups=4, **settings)
    )


def test_layers_without_a_module_around_them() -> None:
    model = Net(Flat(), Flat())
    graph = replaced(model)
    assert list(mixers_of(graph)) == ["blocks.0.fc1", "blocks.1.fc1"]
    gone = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("fc1.bias", "fc2.weight", "fc2.bias")}
    assert set(model.state_dict()) - set(graph.state_dict()) == gone
    assert graph(images()).shape == (2, 10)
    with pytest.raises(MatchError, match="is Linear, relu, Linear"):
        replaced(model, initialise="project")


def test_weights_that_are_no_layer_are_refused() -> None:
    with pytest.raises(MatchError, match=r"linear over tokens.*and not by nn\.Linear between two exchanges"):
        replaced(Net(Flat(functional=True)))


def test_a_class_token_among_the_tokens_is_refused() -> None:
    assert list(mixers_of(replaced(Net(TokensBy(nn.Linear(16, 16)))))) == ["blocks.0.tokens"]
    with pytest.raises(MatchError, match=r"mixes in prefix tokens \(1\)"):
        replaced(Net(TokensBy(nn.Linear(17, 17)), class_token=True))


def test_a_layer_that_two_blocks_share_is_refused() -> None:
    shared = nn.Linear(16, 16)
    with pytest.raises(MatchError, match=r"cannot be replaced, for .* reads it too"):
        replaced(Net(TokensBy(shared), TokensBy(shared)))
