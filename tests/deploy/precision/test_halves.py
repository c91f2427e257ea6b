"""Half precision as a pass: what it changes, what it leaves and why, and that it can fail."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import Interpreter, Node

import vmkd_fx as vx
from tests.deploy.precision.models import LARGEST, TARGET, Residual, images, lowered, overflowing_vit
from vmkd_fx.deploy.precision import halves
from vmkd_fx.deploy.precision.agreement import compared
from vmkd_fx.deploy.precision.halves import ASKED, HALVES, in_half, logits
from vmkd_fx.deploy.precision.plan import Limits
from vmkd_fx.deploy.precision.rules import PRODUCT, SINGLE, rule_of
from vmkd_fx.errors import ModelError, UnknownNameError, VerificationError
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.rewrite import is_call

aten = torch.ops.aten
GRAPHS = ("vit", "mixer", "residual", pytest.param("foldable", marks=pytest.mark.slow))


class Dtypes(Interpreter):
    """What each node computes in."""

    def __init__(self, module: TracedModule) -> None:
        super().__init__(module)
        self.seen: dict[Node, torch.dtype] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            self.seen[n] = value.dtype
        return value


def dtypes(module: TracedModule) -> dict[Node, torch.dtype]:
    run = Dtypes(module)
    run.run(torch.from_numpy(images(2)))
    return run.seen


def casts(module: TracedModule) -> list[Node]:
    return [node for node in module.graph.nodes if is_call(node, aten._to_copy)]


def why(module: TracedModule) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in module.ledger.steps[-1].refused}


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("name", GRAPHS)
def test_products_are_half_norms_are_not_and_casts_stand_between(name: str, precision: str) -> None:
    graph = in_half(lowered(name), precision, images())
    seen = dtypes(graph)
    half = HALVES[precision]
    for node, dtype in seen.items():
        if node.op == "call_function" and rule_of(node).kind == PRODUCT:
            assert dtype == half, node
        elif node.op == "call_function" and rule_of(node).kind == SINGLE and node not in casts(graph):
            assert dtype == torch.float32, node
    (given,) = graph.graph.find_nodes(op="placeholder")
    assert seen[given] == torch.float32
    (output,) = graph.graph.find_nodes(op="output")
    assert seen[output.args[0]] == torch.float32
    written = casts(graph)
    assert written
    assert all(seen[cast] != seen[cast.args[0]] for cast in written), "a cast to what it is already"
    assert not any(cast.args[0] in written for cast in written), "a cast of a cast"
    pairs = [(cast.args[0], cast.kwargs["dtype"]) for cast in written]
    assert len(set(pairs)) == len(pairs), "the same cast twice"


@pytest.mark.parametrize("name", GRAPHS)
def test_the_ledger_says_what_was_done(name: str) -> None:
    before = lowered(name)
    graph = in_half(before, "fp16", images())
    step = graph.ledger.steps[-1]
    assert graph.ledger.steps[:-1] == before.ledger.steps
    assert step.name == "fp16" and step.matched == len(step.sites) > 0
    assert 0 < step.error < 5e-3 and step.agreement == 1.0
    assert step.checked == "against float32 on 16 calibration images"
    assert "top-1 as" in str(graph.ledger)
    operators = sum(node.op == "call_function" for node in before.graph.nodes)
    assert len(step.sites) + len(step.refused) == operators
    error, agreement = compared(logits(graph, images()), logits(before, images()))
    assert (error, agreement) == (step.error, step.agreement)


def test_what_is_given_stays_and_the_same_comes_out_again() -> None:
    before = lowered("vit")
    code, weights = before.code, {name: (t.dtype, t.data_ptr()) for name, t in before.state_dict().items()}
    first, second = in_half(before, "fp16", images()), in_half(before, "fp16", images())
    assert before.code == code
    assert {name: (t.dtype, t.data_ptr()) for name, t in before.state_dict().items()} == weights
    assert first.code == second.code and first.ledger == second.ledger
    real = {t.dtype for t in first.state_dict().values() if t.is_floating_point()}
    assert real == {torch.float16, torch.float32}
    assert set(first.state_dict()) == set(before.state_dict())


def test_mixed_keeps_the_residual_stream_in_float32() -> None:
    plain, mixed = (in_half(lowered("vit"), precision, images()) for precision in ("fp16", "mixed"))
    streams = [node for node, reason in why(mixed).items() if reason == "a residual stream"]
    sums = [n for n in streams if n.startswith("add")]
    assert len(sums) == 6  # two a block
    assert not any("stream" in reason for reason in why(plain).values())
    assert mixed.ledger.steps[-1].error < plain.ledger.steps[-1].error


def test_a_stream_that_overflows_is_rescued() -> None:
    """The classic failure of vision transformers: one channel beyond 65504, and the norm gives NaN."""
    graph, x = lowered("overflowing"), images(64)
    expected = logits(graph, x)
    plain = overflowing_vit().half()
    with torch.no_grad():
        found = plain(torch.from_numpy(x).half()).float().numpy()
    assert not np.isfinite(found).all()
    for precision in ("fp16", "mixed"):
        rescued = in_half(graph, precision, x)
        error, agreement = compared(logits(rescued, x), expected)
        assert error < 5e-3 and agreement >= 0.95
    assert len(set(expected.argmax(-1))) > 3, "a model that always says the same agrees with anything"


def test_only_what_overflows_is_kept_and_only_as_long_as_it_does() -> None:
    graph = in_half(lowered("overflowing"), "fp16", images())
    reasons = why(graph)
    sums = [node.name for node in lowered("overflowing").graph.nodes if is_call(node, aten.add)]
    assert [name in reasons for name in sums] == [False, False, True, True, True, True, True]
    large = {node: reason for node, reason in reasons.items() if "2.0e+05" in reason}
    assert set(sums[2:]) < set(large)
    (head,) = [n for n in graph.graph.nodes if is_call(n, aten.linear) and "head_weight" in str(n.args)]
    assert head.name not in reasons
    assert not any(reason.startswith("reaches") for reason in why(in_half(lowered("vit"), "fp16")).values())


def test_ranges_are_guessed_from_random_images_with_a_wider_margin() -> None:
    step = in_half(lowered("vit"), "fp16").ledger.steps[-1]
    assert step.checked == "against float32 on 8 random images"
    assert any(
        "reaches" in r.reason for r in in_half(lowered("overflowing"), "fp16").ledger.steps[-1].refused
    )
    assert Limits(torch.float16, 4.0).fits(LARGEST / 4) and not Limits(torch.float16, 16.0).fits(LARGEST / 4)
    assert Limits(torch.bfloat16, 16.0).fits(1e30)


def test_without_the_ranges_the_pass_refuses_its_own_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "fits", lambda *_: True)
    with pytest.raises(VerificationError, match="in fp16: the logits are no longer finite on 16 images"):
        in_half(lowered("overflowing"), "fp16", images())


def test_a_graph_that_takes_bytes() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    graph = vx.lower(vx.trace(Residual(), input_size=(3, 32, 32)), TARGET, frames="uint8")
    for given in (frames, None):
        step = in_half(graph, "fp16", given).ledger.steps[-1]
        assert 0 < step.error < 5e-3


class Extremes(nn.Module):
    """Weights that half cannot hold, numbers that vanish in it, and one weight for two precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 10
        self.huge, self.faint = nn.Linear(48, 10), nn.Linear(48, 10)
        self.both, self.plain = nn.Parameter(torch.randn(10)), nn.Linear(10, 10)
        with torch.no_grad():
            self.huge.weight.mul_(1e6)
            self.faint.weight.mul_(1e-7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        y = torch.tanh(self.huge(x * 1e-6)) + self.faint(x) + 1e-9
        y = nn.functional.layer_norm(y, (10,), self.both) * self.both
        return self.plain(torch.sigmoid(y))


def test_weights_and_numbers_that_do_not_fit() -> None:
    model = vx.trace(Extremes(), input_size=(3, 4, 4))
    graph = in_half(vx.lower(model, TARGET, passes=[]), "fp16", images(8, 4))
    reasons = Counter(reason.split(" by ")[0].split(" up to ")[0] for reason in why(graph).values())
    assert reasons["reads weights"] == 1 and reasons["rounding moves its weights"] == 1
    assert reasons["the number 1.0e-06 does not fit"] == 1 and reasons["the number 1.0e-09 does not fit"] == 1
    assert len(graph.meta[ASKED].kept) == 2
    held = {name: tensor.dtype for name, tensor in graph.state_dict().items()}
    assert held["both"] == torch.float32 and held["both_float16"] == torch.float16
    assert held["plain.weight"] == torch.float16 and held["huge.weight"] == torch.float32
    assert graph.ledger.steps[-1].error < 2e-3


def test_it_refuses_what_it_cannot_lower() -> None:
    with pytest.raises(UnknownNameError, match="half precision 'fp17'"):
        in_half(lowered("vit"), "fp17")
    with pytest.raises(ModelError, match="is in float16: precision is lowered from float32"):
        in_half(in_half(lowered("vit"), "fp16", images()), "fp16")
    assert halves.HALVES.keys() == {"fp16", "bf16", "mixed"}


def test_logits_that_are_no_numbers_agree_with_nothing() -> None:
    expected = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert compared(expected, expected) == (0.0, 1.0)
    assert compared(expected[:, ::-1], expected) == (1.0, 0.0)
    assert compared(np.array([[np.nan, 0.0], [0.0, 1.0]]), expected) == (float("inf"), 0.5)
