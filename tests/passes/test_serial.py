"""Two linear maps in a row become one where that is no dearer; what must not is named."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import nn

import vmkd_fx as vx
from tests.passes.test_parallel import (
    CORRUPTIONS,
    Body,
    Net,
    apply,
    calls,
    conv,
    depthwise,
    lowered,
    middle,
    normed,
    random_map,
    two,
)
from vmkd_fx.errors import VerificationError
from vmkd_fx.graph.shapes import parameter_count
from vmkd_fx.passes.fold import serial
from vmkd_fx.passes.fold.linear_map import Form, LinearMap, compose_maps, composed_form
from vmkd_fx.passes.fold.parallel import PARALLEL
from vmkd_fx.passes.fold.serial import SERIAL
from vmkd_fx.steps import Step

PASSES = ["constants", "channel_affine", PARALLEL, SERIAL]


def composed(body: nn.Module) -> tuple[float, list[str], Step]:
    error, module, step = lowered(Net(body), "serial", PASSES)
    return error, middle(module), step


def tokens(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


def image(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).unflatten(2, (16, 16))


def over_tokens(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x.transpose(1, 2)).transpose(1, 2)


COMPOSED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "1x1 after 3x3": (two(lambda m, x: m.b(m.a(x)), a=conv(8, 16), b=conv(16, 8, 1)), ["conv2d"]),
    "3x3 without a border after 1x1": (
        two(lambda m, x: m.b(m.a(x)), a=conv(8, 16, 1), b=conv(16, 8, padding=0)), ["conv2d"],
    ),
    "3x3 with a border after 1x1 without a bias": (
        two(lambda m, x: m.b(m.a(x)), a=conv(8, 16, 1, bias=False), b=conv(16, 8)), ["conv2d"],
    ),
    "BatchNorm between": (
        two(lambda m, x: m.b(m.a(x)), a=normed(conv()), b=normed(conv(kernel=1))), ["conv2d"],
    ),
    "a stride in each": (
        two(lambda m, x: m.b(m.a(x)), a=conv(kernel=2, stride=2, padding=0), b=conv(kernel=1, stride=2)),
        ["conv2d"],
    ),
    "a dense 3x3 after a depthwise scale": (
        two(lambda m, x: m.b(m.a(x)), a=depthwise(1, bias=False), b=conv()), ["conv2d"],
    ),
    "depthwise after dense": (two(lambda m, x: m.b(m.a(x)), a=conv(), b=depthwise(1)), ["conv2d"]),
    "three in a row": (
        two(lambda m, x: m.c(m.b(m.a(x))), a=conv(kernel=1), b=conv(kernel=1), c=conv(8, 8, 1)), ["conv2d"],
    ),
    "Linear after Linear": (
        two(lambda m, x: image(m.b(m.a(tokens(x)))), a=nn.Linear(8, 32), b=nn.Linear(32, 8, bias=False)),
        ["flatten", "transpose", "linear", "transpose", "unflatten"],
    ),
    "Linear after a patch embedding": (
        two(lambda m, x: image(m.b(tokens(m.a(x)))), a=conv(8, 16), b=nn.Linear(16, 8)),
        ["conv2d", "flatten", "transpose", "transpose", "unflatten"],
    ),
    "a convolution after a Linear": (
        two(lambda m, x: m.b(image(m.a(tokens(x)))), a=nn.Linear(8, 24, bias=False), b=conv(24, 8)),
        ["flatten", "transpose", "transpose", "unflatten", "conv2d"],
    ),
    "a reshape that names the channels": (
        two(
            lambda m, x: m.b(m.a(tokens(x)).reshape(-1, 16, 16, 24).permute(0, 3, 1, 2)),
            a=nn.Linear(8, 24), b=conv(24, 8, 1),
        ),
        ["flatten", "transpose", "reshape", "permute", "conv2d"],
    ),
    "an unflatten that names the channels": (
        two(
            lambda m, x: image(m.b(m.a(tokens(x)).unflatten(2, (1, 24)).flatten(1, 2))),
            a=nn.Linear(8, 24), b=nn.Linear(24, 8),
        ),
        ["flatten", "transpose", "unflatten", "flatten", "linear", "transpose", "unflatten"],
    ),
    "tokens after tokens": (
        two(
            lambda m, x: image(over_tokens(m.b, over_tokens(m.a, tokens(x)))),
            a=nn.Linear(256, 300), b=nn.Linear(300, 256),
        ),
        ["flatten", "linear", "unflatten"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPOSED)
def test_two_maps_in_a_row_become_one(case: str) -> None:
    torch.manual_seed(0)
    make, expected = COMPOSED[case]
    error, found, step = composed(make())
    maps = ("conv2d", "linear")
    assert [name for name in found if name in maps] == [name for name in expected if name in maps]
    assert step.matched == (2 if case == "three in a row" else 1)
    assert error < 1e-12


@pytest.mark.parametrize("case", ["a reshape that names the channels", "Linear after a patch embedding"])
def test_layouts_between_stay_as_they_are(case: str) -> None:
    make, expected = COMPOSED[case]
    assert composed(make())[1] == expected


def test_a_composed_branch_joins_its_sum() -> None:
    """A 1x1 and a 3x3 in a row beside a 3x3: one map, then one sum."""
    body = Body(lambda m, x: m.a(x) + m.c(m.b(x)) + x, a=conv(), b=conv(8, 32, 1, bias=False), c=conv(32, 8))
    error, found, step = composed(body)
    assert found == ["conv2d"]
    assert sorted(site.what for site in step.sites) == [
        "into one from 2 branches",
        "into one from two in a row",
    ]
    assert error < 1e-12


def tied() -> nn.Module:
    body = Body(lambda m, x: m.b(m.a(x)), a=conv(kernel=1), b=conv(kernel=1))
    body.b.weight = body.a.weight
    return body


STAY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a bias before zero padding": (
        two(lambda m, x: m.b(m.a(x)), a=conv(8, 32, 1), b=conv(32, 8)),
        "zeros where the first would give its bias",
    ),
    "a border before zero padding": (
        two(lambda m, x: m.b(m.a(x)), a=conv(8, 64, bias=False), b=conv(64, 8)), "values of the border",
    ),
    "a bottleneck": (
        two(lambda m, x: m.b(m.a(x)), a=conv(8, 2, 1), b=conv(2, 8, 1)),
        "would take 16384 multiply-adds instead of 8192",
    ),
    "depthwise before pointwise": (
        two(lambda m, x: m.b(m.a(x)), a=depthwise(padding=0), b=conv(kernel=1)), "multiply-adds instead of",
    ),
    "fewer multiply-adds, but more weights": (
        two(lambda m, x: m.b(m.a(x)), a=conv(8, 8, 1), b=depthwise(stride=8, padding=0)),
        "weights instead of",
    ),
    "a nonlinearity": (two(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(kernel=1), b=conv(kernel=1)), ""),
    "a first that is read elsewhere": (
        two(lambda m, x: (lambda y: m.b(y) + torch.relu(y))(m.a(x)), a=conv(kernel=1), b=conv(kernel=1)),
        "conv2d_1 before it is read by other nodes too",
    ),
    "tied weights": (tied, "are used 2 times"),
    "tokens after channels": (
        two(
            lambda m, x: image(over_tokens(m.b, m.a(tokens(x)))), a=nn.Linear(8, 256), b=nn.Linear(256, 256),
        ),
        "linear before it are on another axis",
    ),
    "heads that a reshape splits": (
        two(
            lambda m, x: image(m.b(m.a(tokens(x)).unflatten(2, (2, 16))).flatten(2)),
            a=nn.Linear(8, 32), b=nn.Linear(16, 4),
        ),
        "linear before it are on another axis",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAY)
def test_what_must_not_compose_stays_with_the_reason(case: str) -> None:
    torch.manual_seed(0)
    make, reason = STAY[case]
    width = 256 if case == "tokens after channels" else None
    error, _, step = lowered(Net(make(), width), "serial", PASSES)
    assert step.matched == 0
    assert [refusal for refusal in step.refused if reason in refusal.reason] or not reason, step.refused
    assert error < 1e-12


def test_nothing_grows_and_it_is_idempotent() -> None:
    body = two(lambda m, x: m.b(m.a(x)), a=conv(8, 16), b=conv(16, 8, 1))()
    _, module, step = lowered(Net(body), "serial", PASSES)
    assert step.parameters == parameter_count(module) < sum(p.numel() for p in Net(body).parameters())
    again = vx.lower(module, passes=PASSES)
    assert all(not step.matched for step in vx.ledger(again).steps if step.name in ("parallel", "serial"))
    assert calls(again) == calls(module)
    assert set(module.state_dict()) == {
        *("stem.weight", "stem.bias", "head.weight", "head.bias"),
        *("middle.a.weight", "middle.a.bias"),
    }


# The maths, alone


def test_every_composition_of_two_convolutions_that_has_a_form() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 13, dtype=torch.float64)
    axes = (product((1, 2, 3), (1, 2), (0, 1), (1, 2), (1, 4)) for _ in range(2))
    firsts, seconds = (
        [Form(outputs, inputs, (k,), (s,), (p,), (d,), g) for k, s, p, d, g in rows]
        for rows, (outputs, inputs) in zip(axes, ((8, 4), (4, 8)), strict=True)
    )
    done = 0
    for first, second in product(firsts, seconds):
        has_bias = (len(firsts) + done) % 2 == 0
        form = composed_form(second, first, has_bias)
        if isinstance(form, str) or min(first.size((13,))) < 5:
            continue
        maps = random_map(second, bias=done % 3 > 0), random_map(first, bias=has_bias)
        expected = apply(maps[0], apply(maps[1], x))
        assert form.size((13,)) == expected.shape[2:]
        torch.testing.assert_close(apply(compose_maps(*maps, form), x), expected, rtol=1e-12, atol=1e-12)
        done += 1
    assert done > 300


@pytest.mark.parametrize("axes", [0, 2])
def test_a_composition_over_other_axes(axes: int) -> None:
    torch.manual_seed(0)
    second, first = (random_map(Form(*edges)).with_axes(axes) for edges in ((5, 7), (7, 3)))
    form = composed_form(second.form, first.form, has_bias=True)
    assert isinstance(form, Form)
    made = compose_maps(second, first, form)
    flat = made.weight.flatten(1)
    torch.testing.assert_close(flat, second.weight.flatten(1) @ first.weight.flatten(1))
    assert made.bias is not None and second.bias is not None and first.bias is not None
    torch.testing.assert_close(made.bias, second.weight.flatten(1) @ first.bias + second.bias)


# The verifier


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_verifier_catches_a_corrupted_composition(
    monkeypatch: pytest.MonkeyPatch, corruption: str
) -> None:
    corrupt = CORRUPTIONS[corruption]

    def wrong(second: LinearMap, first: LinearMap, form: Form) -> LinearMap:
        return corrupt(compose_maps(second, first, form))

    monkeypatch.setattr(serial, "compose_maps", wrong)
    with pytest.raises(VerificationError, match="pass serial"):
        composed(two(lambda m, x: m.b(m.a(x)), a=conv(8, 16), b=conv(16, 8, 1))())


def test_the_verifier_catches_a_border_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        serial, "composed_form", lambda second, first, has_bias: composed_form(second, first, False)
    )
    with pytest.raises(VerificationError, match="pass serial"):
        composed(STAY["a bias before zero padding"][0]())
