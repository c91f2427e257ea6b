"""Norms of one group for engines: a layer norm whose affine goes on, or comes back where nothing takes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import vmkd_fx as vx
from tests.models import FoldableNet, small
from tests.slow import rest_slow
from vmkd_fx.errors import PassError, VerificationError
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import randomise_
from vmkd_fx.passes.engine import norms
from vmkd_fx.passes.engine.norms import GROUP_NORMS
from vmkd_fx.passes.rewrite import argument, is_call

aten = torch.ops.aten
PASSES = ("constants", GROUP_NORMS, "channel_affine")


class NormNet(nn.Module):
    """A norm of one group between two convolutions; members say what stands behind it."""

    groups = 1

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.GroupNorm(self.groups, 8)
        self.conv = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 10)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.mix(self.norm(x))).mean((2, 3)))


class Pooled(NormNet):
    """PoolFormer's mixer and its LayerScale: the shift cancels, the scale goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return (self.pool(x) - x) * self.scale


class Gated(NormNet):
    """Nothing takes the affine in front of an activation."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.tanh(x))


class Plain(NormNet):
    """Without weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 8, affine=False)


class Groups(NormNet):
    groups = 2


class Tapped(Gated):
    """Somebody reads the norm beside the activation."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.tanh(x)) * torch.sigmoid(x)


class Called(Gated):
    """The norm is called twice."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.conv(torch.tanh(x))))


def lowered(
    model: nn.Module, target: str = "onnxruntime", size: int = 16
) -> tuple[TracedModule, dict[str, int | None]]:
    result = vx.lower(vx.trace(model.eval(), input_size=(3, size, size)), target, passes=PASSES)
    return result, {step.name: step.matched for step in vx.ledger(result).steps}


def count(module: TracedModule, *operators: object) -> int:
    return sum(is_call(node, *operators) for node in module.graph.nodes)


@pytest.mark.parametrize(
    ("make", "count_of_norms", "moved", "arithmetic"),
    [
        (NormNet, 1, 1, 0),
        (Pooled, 1, 1, 1),
        (Gated, 1, 0, 0),
        (Plain, 1, 0, 0),
        (Groups, 0, 0, 0),
        (Tapped, 1, 0, 1),
        (Called, 2, 0, 0),
    ],
)
def test_sites(make: Callable[[], nn.Module], count_of_norms: int, moved: int, arithmetic: int) -> None:
    module, matched = lowered(randomise_(make()))
    assert matched["group_norms"] == count_of_norms + moved
    assert count(module, aten.mul) == arithmetic
    assert count(module, aten.group_norm) == (make is Groups)
    found = [node for node in module.graph.nodes if is_call(node, aten.layer_norm)]
    assert [argument(norm, "weight") is None for norm in found] == [
        bool(moved) or make is Plain
    ] * count_of_norms
    errors = [step.error for step in vx.ledger(module).steps if step.error is not None]
    assert max(errors) < 1e-13


def test_what_nothing_takes_is_written_out_over_the_image() -> None:
    model = randomise_(Gated())
    module, _ = lowered(model)
    (norm,) = (node for node in module.graph.nodes if is_call(node, aten.layer_norm))
    for name, vector in (("weight", model.norm.weight), ("bias", model.norm.bias)):
        held = module.get_parameter(str(argument(norm, name).target))
        assert torch.equal(held, vector[:, None, None].expand(8, 4, 4))


def test_torch_keeps_its_group_norm() -> None:
    module, matched = lowered(NormNet(), "torch")
    assert matched["group_norms"] == 0
    assert count(module, aten.group_norm) == 1


@pytest.mark.parametrize("target", rest_slow(["onnxruntime", "tensorrt", "tensorrt-rtx"]))
def test_poolformers_norms_keep_no_weights(target: str) -> None:
    module, matched = lowered(randomise_(small("poolformer")), target, size=64)
    assert matched["group_norms"] == 16
    found = [node for node in module.graph.nodes if is_call(node, aten.layer_norm)]
    assert [argument(norm, "weight") is None for norm in found] == [True] * 8 + [False]


def test_riformers_affine_still_folds() -> None:
    module, _ = lowered(FoldableNet(), size=32)
    assert count(module, aten.mul, aten.sub) == 0


def test_it_is_idempotent() -> None:
    once, _ = lowered(Gated())
    again, matched = lowered(once)
    assert matched["group_norms"] == 0
    assert [node.target for node in again.graph.nodes if node.op == "call_function"] == [
        node.target for node in once.graph.nodes if node.op == "call_function"
    ]


@pytest.mark.parametrize("corruption", ["one percent", "flipped sign", "wrong axis", "dropped bias"])
def test_a_wrong_rewrite_is_caught(monkeypatch: pytest.MonkeyPatch, corruption: str) -> None:
    right = norms.along

    def wrong(vector: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
        changed = {
            "one percent": lambda: vector * 1.01,
            "flipped sign": lambda: -vector,
            "wrong axis": lambda: vector.flip(0),
            "dropped bias": lambda: torch.zeros_like(vector),
        }
        return right(changed[corruption](), axis, rank)

    monkeypatch.setattr(norms, "along", wrong)
    with pytest.raises(VerificationError, match="pass group_norms"):
        lowered(Gated())


def test_a_wrong_order_is_refused() -> None:
    with pytest.raises(PassError, match="'group_norms' has to follow 'constants'"):
        vx.lower(NormNet(), passes=(GROUP_NORMS, "constants"))
