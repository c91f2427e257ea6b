"""Linear branches of one input that are summed become one convolution; what must not merge is named."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import gcd

import pytest
import torch
from torch import nn

import vmkd_fx as vx
from tests.models import renamed
from vmkd_fx.errors import VerificationError
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import logits_of, probe_images, randomise_, relative_error
from vmkd_fx.passes.fold import parallel
from vmkd_fx.passes.fold.linear_map import Form, LinearMap, add_maps, diagonal, in_groups, sum_form
from vmkd_fx.passes.fold.parallel import PARALLEL
from vmkd_fx.steps import Step

PASSES = ["constants", "channel_affine", PARALLEL]


class Net(nn.Module):
    """A stem, what is tested, a head."""

    def __init__(self, middle: nn.Module, width: int | None = None, channels: int = 8) -> None:
        super().__init__()
        self.num_classes = 10
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.middle = middle
        self.head = nn.Linear(width or channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.middle(torch.tanh(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Body(nn.Module):
    """Modules, and what to do with them: `function(self, x)`."""

    def __init__(self, function: Callable[[nn.Module, torch.Tensor], torch.Tensor], **parts: object) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def conv(
    inputs: int = 8, outputs: int = 8, kernel: int | tuple[int, int] = 3, **options: object
) -> nn.Conv2d:
    edges = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    same = tuple(edge // 2 for edge in edges)
    return nn.Conv2d(inputs, outputs, edges, **{"padding": same, **options})  # type: ignore[arg-type]


def depthwise(kernel: int | tuple[int, int] = 3, channels: int = 8, **options: object) -> nn.Conv2d:
    return conv(channels, channels, kernel, groups=channels, **options)


def normed(layer: nn.Module, channels: int = 8) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm2d(channels))


def lowered(
    model: nn.Module, name: str = "parallel", passes: list | None = None
) -> tuple[float, TracedModule, Step]:
    """The lowered model, its error and the pass's row of the ledger; random parameters."""
    torch.manual_seed(0)
    model = randomise_(model).double().eval()
    result = vx.lower(vx.trace(model, copy=True, input_size=(3, 32, 32)), passes=passes or PASSES)
    images = probe_images(result)
    with torch.no_grad():
        error = relative_error(model(images), logits_of(result, images))
    (step,) = (step for step in vx.ledger(result).steps if step.name == name)
    return error, result, step


def calls(module: TracedModule) -> list[str]:
    nodes = (node for node in module.graph.nodes if node.op == "call_function")
    return [node.target.overloadpacket.__name__ for node in nodes]


REST = ["conv2d", "tanh", "relu", "mean", "linear"]  # of `Net`


def middle(module: TracedModule) -> list[str]:
    """The operators between the stem and the head."""
    found = calls(module)
    assert found[:2] == REST[:2]
    assert found[-3:] == REST[2:]
    return found[2:-3]


def repvgg(groups: int = 1) -> Body:
    """RepVGG's block: 3x3, 1x1 and identity, each with a BatchNorm."""
    return Body(
        lambda m, x: m.dense(x) + m.point(x) + m.bn(x),
        dense=normed(conv(bias=False, groups=groups)),
        point=normed(conv(kernel=1, bias=False, groups=groups)),
        bn=nn.BatchNorm2d(8),
    )


def repmixer() -> Body:
    """FastViT's mixer, with its LayerScale and the residual outside."""
    return Body(
        lambda m, x: x + m.gamma * ((m.wide(x) + m.small(x) + m.skip(x)) - m.norm(x)),
        gamma=nn.Parameter(torch.rand(8, 1, 1)),
        wide=normed(depthwise(bias=False)),
        small=normed(depthwise(1, bias=False)),
        skip=nn.BatchNorm2d(8),
        norm=nn.BatchNorm2d(8),
    )


def copies() -> Body:
    """MobileOne's copies, added up from zero."""
    return Body(
        lambda m, x: sum(branch(x) for branch in m.copies),
        copies=nn.ModuleList(normed(conv(8, 12, stride=2), 12) for _ in range(4)),
    )


def two(function: Callable[[nn.Module, torch.Tensor], torch.Tensor], **parts: object) -> Callable[[], Body]:
    return lambda: Body(function, **parts)


ONE_MAP: dict[str, Callable[[], nn.Module]] = {
    "RepVGG": repvgg,
    "RepVGG in groups": lambda: repvgg(4),
    "RepMixer": repmixer,
    "copies": copies,
    "BatchNorm behind the sum": lambda: Body(
        lambda m, x: m.bn(m.one(x) + m.other(x) + x),
        one=depthwise(),
        other=depthwise(1),
        bn=nn.BatchNorm2d(8),
    ),
    "other association": lambda: Body(
        lambda m, x: m.a(x) + ((m.b(x) - x) - (x - m.c(x))), a=conv(), b=conv(kernel=1), c=conv()
    ),
    "negative": lambda: Body(lambda m, x: 3 - (m.a(x) + m.b(x)), a=conv(), b=conv()),
    "alpha": lambda: Body(lambda m, x: torch.sub(m.a(x), m.b(x), alpha=0.5), a=conv(), b=conv()),
    "same twice": lambda: Body(lambda m, x: (lambda y: y + y - x)(m.a(x)), a=conv()),
    "mean of two": lambda: Body(
        lambda m, x: (m.a(x) + m.b(x)) / 2 + 1, a=conv(bias=False), b=conv(bias=False)
    ),
    "rows and columns in a square": lambda: Body(
        lambda m, x: m.a(x) + m.b(x) + m.c(x), a=conv(kernel=(1, 3)), b=conv(), c=conv(kernel=(3, 1))
    ),
    "dilated in a large one": lambda: Body(
        lambda m, x: m.a(x) + m.b(x), a=depthwise(7), b=depthwise(3, padding=3, dilation=3)
    ),
    "depthwise in a dense one": lambda: Body(lambda m, x: m.a(x) + m.b(x), a=conv(), b=depthwise()),
    "an average": lambda: Body(lambda m, x: m.a(x) - nn.functional.avg_pool2d(x, 3, 1, 1), a=depthwise()),
    "an average with a stride": lambda: Body(
        lambda m, x: m.a(x) + nn.functional.avg_pool2d(x, 2), a=conv(stride=2)
    ),
    "padding by name": lambda: Body(
        lambda m, x: m.a(x) + m.b(x) + x, a=conv(padding="same"), b=conv(kernel=1, padding="valid")
    ),
    "a constant": lambda: Body(
        lambda m, x: m.a(x) + (m.b(x) + m.c),
        a=conv(bias=False),
        b=conv(bias=False),
        c=nn.Parameter(torch.rand(8, 1, 1)),
    ),
}


@pytest.mark.parametrize("case", ONE_MAP)
def test_branches_become_one_convolution(case: str) -> None:
    torch.manual_seed(0)
    body = ONE_MAP[case]()
    error, module, step = lowered(Net(body, 12 if case == "copies" else None))
    assert middle(module) == ["conv2d"]
    assert step.matched == 1
    assert not step.refused
    assert error < 1e-12


def test_two_heads_of_one_feature_become_one_linear() -> None:
    """RepViT and LeViT predict with the mean of two heads, each behind a BatchNorm."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, 4)
            self.one = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 10))
            self.other = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 10, bias=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.stem(x)).mean((2, 3))
            return (self.one(x) + self.other(x)) / 2

    error, module, step = lowered(Heads())
    assert calls(module) == ["conv2d", "tanh", "mean", "linear"]
    assert step.matched == 1
    assert error < 1e-12


def test_a_linear_takes_its_residual() -> None:
    body = Body(
        lambda m, x: (lambda y: (y + m.a(y)).permute(0, 3, 1, 2))(x.permute(0, 2, 3, 1)), a=nn.Linear(8, 8)
    )
    error, module, _ = lowered(Net(body))
    assert middle(module) == ["permute", "linear", "permute"]
    assert error < 1e-12


def test_renamed_classes_merge_the_same() -> None:
    _, module, step = lowered(renamed(Net(repmixer())))
    assert middle(module) == ["conv2d"]
    assert step.matched == 1


PART: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "terms of two inputs": (
        two(lambda m, x: m.a(x) + m.b(x) + m.c(torch.relu(x)), a=conv(), b=conv(), c=conv()),
        ["relu", "conv2d", "conv2d", "add"],
    ),
    "a term that is read elsewhere": (
        two(
            lambda m, x: (lambda y: m.a(x) + m.b(x) + y + torch.relu(y))(m.c(x)),
            a=conv(), b=conv(), c=conv(),
        ),
        ["conv2d", "relu", "conv2d", "add", "add"],
    ),
    "dense and depthwise apart": (
        two(
            lambda m, x: m.a(x) + m.b(x) + m.c(x) + m.d(x),
            a=conv(kernel=1), b=depthwise(5), c=conv(kernel=1), d=depthwise(3),
        ),
        ["conv2d", "conv2d", "add"],
    ),
    "a scale that differs between the places": (
        two(
            lambda m, x: m.a(x) + m.b(x) + m.s * m.c(x),
            a=conv(), b=conv(), c=conv(), s=nn.Parameter(torch.rand(16, 1)),
        ),
        ["conv2d", "conv2d", "mul", "add"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PART)
def test_only_what_belongs_together_merges(case: str) -> None:
    torch.manual_seed(0)
    make, expected = PART[case]
    error, module, step = lowered(Net(make()))
    assert sorted(middle(module)) == sorted(expected)
    assert step.matched == 1
    assert error < 1e-12


def tied() -> nn.Module:
    body = Body(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv())
    body.b.weight = body.a.weight
    return body


STAY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dense 1x1 and depthwise 3x3": (
        two(lambda m, x: m.a(x) + m.b(x), a=conv(kernel=1), b=depthwise()),
        "one map of both would have 576 weights instead of 136",
    ),
    "a row and a column": (
        two(lambda m, x: m.a(x) + m.b(x), a=conv(kernel=(1, 3)), b=conv(kernel=(3, 1))),
        "would have 576 weights instead of 384",
    ),
    "other strides": (
        two(lambda m, x: m.a(x) + m.b(x), a=conv(stride=7, padding=0), b=conv(stride=8, padding=1)),
        "their strides (7, 7) and (8, 8) differ",
    ),
    "reflected borders": (
        two(lambda m, x: m.a(x) + m.b(x), a=conv(padding_mode="reflect"), b=conv(kernel=1)),
        "its terms read different inputs",
    ),
    "two inputs": (
        two(lambda m, x: m.a(x) + m.b(torch.relu(x)), a=conv(), b=conv()), "its terms read different inputs",
    ),
    "an intermediate that is read elsewhere": (
        two(lambda m, x: (lambda y: m.b(x) + y + torch.relu(y))(m.a(x)), a=conv(), b=conv()),
        "conv2d_1 is read by other nodes too",
    ),
    "a module called twice": (
        two(lambda m, x: m.a(x) + m.b(m.a(torch.relu(x))), a=conv(), b=conv()), "are used 2 times",
    ),
    "tied weights": (tied, "are used 2 times"),
    "unequal sizes": (
        two(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(kernel=16, padding=0)),
        "conv2d_2 is smaller than the sum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAY)
def test_what_must_not_merge_stays_with_the_reason(case: str) -> None:
    torch.manual_seed(0)
    make, reason = STAY[case]
    error, _, step = lowered(Net(make()))
    assert step.matched == 0
    assert any(reason in refusal.reason for refusal in step.refused), step.refused
    assert error < 1e-12


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.AvgPool2d(2, ceil_mode=True)]
)
def test_an_average_over_fewer_places_at_the_border_is_no_map(pool: nn.AvgPool2d) -> None:
    body = Body(lambda m, x: m.a(x) + pool(x), a=conv(stride=pool.stride))
    error, module, step = lowered(Net(body))
    assert step.matched == 0
    assert middle(module) == ["conv2d", "avg_pool2d", "add"]
    assert error < 1e-12


def test_an_identity_alone_makes_no_convolution() -> None:
    body = Body(
        lambda m, x: torch.relu(m.bn(x) + x) + nn.functional.avg_pool2d(x, 3, 1, 1) - x, bn=nn.BatchNorm2d(8)
    )
    _, module, step = lowered(Net(body))
    assert step.matched == 0
    assert "conv2d" not in middle(module)


def test_it_is_idempotent_and_leaves_the_source_alone() -> None:
    model = Net(repmixer())
    _, module, _ = lowered(model)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    again = vx.lower(module, passes=PASSES)
    assert all(not step.matched for step in vx.ledger(again).steps if step.name == "parallel")
    assert calls(again) == calls(module)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert len(list(model.middle.wide.parameters())) == 3
    assert set(state) == {
        f"{layer}.{kind}" for layer in ("stem", "middle.wide.0", "head") for kind in ("weight", "bias")
    }


# The maths, alone

FORMS = [
    Form(8, 4, (k,), (s,), (p,), (d,), g)
    for k, s, p, d, g in product((1, 2, 3), (1, 2), (0, 1, 2), (1, 2), (1, 4))
]


def random_map(form: Form, bias: bool = True) -> LinearMap:
    weight = torch.randn(form.outputs, form.inputs // form.groups, *form.kernel, dtype=torch.float64)
    return LinearMap(form, weight, torch.randn(form.outputs, dtype=torch.float64) if bias else None)


def apply(made: LinearMap, x: torch.Tensor) -> torch.Tensor:
    form = made.form
    return nn.functional.conv1d(
        x, made.weight, made.bias, form.stride, form.padding, form.dilation, form.groups
    )


def test_every_sum_of_two_convolutions_that_has_a_form() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 11, dtype=torch.float64)
    summed = 0
    for one, other in product(FORMS, FORMS):
        form = sum_form(one, other)
        if isinstance(form, str) or not one.size((11,)) == other.size((11,)) == form.size((11,)):
            continue
        maps = [random_map(one), random_map(other, bias=summed % 2 == 0)]
        expected = apply(maps[0], x) + apply(maps[1], x)
        torch.testing.assert_close(apply(add_maps(maps, form), x), expected, rtol=1e-12, atol=1e-12)
        summed += 1
    assert summed > 300


@pytest.mark.parametrize(("groups", "fewer"), [(8, 1), (8, 2), (4, 4), (4, 2), (6, 3)])
def test_a_kernel_in_fewer_groups(groups: int, fewer: int) -> None:
    channels = 2 * groups
    weight = torch.randn(3 * groups, 2, 3, 3)
    x = torch.randn(1, channels, 5, 5)
    wide = in_groups(weight, groups, fewer)
    assert wide.shape == (3 * groups, channels // fewer, 3, 3)
    assert int((wide != 0).sum()) == weight.numel()
    torch.testing.assert_close(torch.conv2d(x, wide, groups=fewer), torch.conv2d(x, weight, groups=groups))


def test_the_form_of_a_sum_has_the_groups_that_both_respect() -> None:
    one, other = (Form(12, 12, groups=groups) for groups in (4, 6))
    found = sum_form(one, other)
    assert isinstance(found, Form)
    assert found.groups == gcd(4, 6)


@pytest.mark.parametrize("axes", [0, 1, 2])
def test_a_diagonal_is_a_scale(axes: int) -> None:
    scale, x = torch.rand(5), torch.randn(2, 5, *[4] * axes)
    weight = diagonal(scale, axes).weight
    assert weight.shape == (5, 1, *[1] * axes)
    dense = in_groups(weight, 5, 1).flatten(1)
    torch.testing.assert_close(torch.einsum("oc,bc...->bo...", dense, x), x * scale.view(-1, *[1] * axes))


# The verifier

CORRUPTIONS: dict[str, Callable[[LinearMap], LinearMap]] = {
    "dropped bias": lambda m: LinearMap(m.form, m.weight, None),
    "flipped sign": lambda m: LinearMap(m.form, m.weight, None if m.bias is None else -m.bias),
    "flipped kernel": lambda m: LinearMap(m.form, -m.weight, m.bias),
    "one percent": lambda m: LinearMap(m.form, m.weight * 1.01, m.bias),
    "wrong axis": lambda m: LinearMap(m.form, m.weight.flip(0), m.bias),
    "mirrored": lambda m: LinearMap(m.form, m.weight.flip(-1), m.bias),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_verifier_catches_a_corrupted_sum(monkeypatch: pytest.MonkeyPatch, corruption: str) -> None:
    corrupt = CORRUPTIONS[corruption]
    monkeypatch.setattr(parallel, "add_maps", lambda maps, form: corrupt(add_maps(maps, form)))
    with pytest.raises(VerificationError, match=r"pass parallel on .*, at add"):
        lowered(Net(repvgg()))


@pytest.mark.parametrize("corruption", ["flipped kernel", "one percent", "wrong axis"])
def test_the_verifier_catches_a_corrupted_identity(monkeypatch: pytest.MonkeyPatch, corruption: str) -> None:
    corrupt = CORRUPTIONS[corruption]
    monkeypatch.setattr(parallel, "diagonal", lambda scale, axes: corrupt(diagonal(scale, axes)))
    with pytest.raises(VerificationError, match="pass parallel"):
        lowered(Net(repmixer()))


def test_the_verifier_catches_a_lost_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_is_zero", lambda shift: True)
    with pytest.raises(VerificationError, match="pass parallel"):
        lowered(Net(repmixer()))


def test_a_wrong_site_is_rolled_back_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(maps: list[LinearMap], form: Form) -> LinearMap:
        made = add_maps(maps, form)
        return CORRUPTIONS["one percent"](made) if form.groups == 8 else made

    monkeypatch.setattr(parallel, "add_maps", wrong)
    model = Net(nn.Sequential(repvgg(), nn.Tanh(), repmixer()))
    traced = vx.trace(randomise_(model), input_size=(3, 32, 32))
    (step,) = (
        s for s in vx.ledger(vx.lower(traced, passes=PASSES, keep_going=True)).steps if s.name == "parallel"
    )
    assert step.matched == 1
    assert any("rolled back" in refusal.reason for refusal in step.refused)
