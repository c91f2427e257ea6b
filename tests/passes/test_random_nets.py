"""Random networks come out of `lower` computing what they computed; whatever does not fold stays right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, seed, settings
from torch import nn

import vmkd_fx as vx
from tests.checks import assert_same_module, fingerprint
from tests.random_kinds import KINDS
from tests.random_nets import nets
from tests.random_specs import Net, Step
from vmkd_fx.errors import ModelError, TraceError
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import logits_of, relative_error

BOUND = 1e-10
"""Relative, in float64: far under any wrong merge, far over the rounding of a few hundred operations."""

MOST_NOISE = 2e-14
"""Networks that one unit in the last place of their weights moves by more would show rounding, not errors:
`lower` itself allows 1e-12.
"""

ROUNDED = 100
"""What a lowered network in less than float64 may differ by, in units of what a unit in the last place of the
weights does to the network itself: folded weights are rounded anew.
"""


@torch.no_grad()
def noise_of(model: nn.Module, images: torch.Tensor, eps: float) -> float:
    """How far the logits move, relative, when every weight moves by up to one unit in the last place."""
    noisy = deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*noisy.parameters(), *noisy.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(1 + eps * (2 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) - 1))
    return relative_error(logits_of(deepcopy(model), images), logits_of(noisy, images))


def steps_of(steps: Iterable[Step]) -> Iterable[Step]:
    for step in steps:
        yield step
        for branch in step.branches:
            yield from steps_of(branch)


class Tally:
    """What a run over many networks has met."""

    def __init__(self) -> None:
        self.drawn = self.lowered = self.merged = self.before = self.after = 0
        self.kinds: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def check(self, net: Net) -> None:
        """Lower one network and hold the result against it."""
        model = net.build()
        images = torch.randn(3, 3, *net.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        exact = deepcopy(model).double()
        assume(noise_of(exact, images, 2**-53) < MOST_NOISE)
        self.drawn += 1
        self.kinds.update({step.kind for step in steps_of(net.steps)})
        expected = logits_of(deepcopy(exact), images)
        lowered = self.lower(model, net)
        if lowered is None:
            return
        assert {p.dtype for p in lowered.parameters() if p.is_floating_point()} <= {net.dtype}
        found = logits_of(lowered.double(), images)
        error = relative_error(expected, found)
        bound = BOUND
        if net.dtype != torch.float64:
            bound = ROUNDED * noise_of(exact, images, torch.finfo(net.dtype).eps / 2)
        assert error < bound, f"the logits differ by {error:.3g} relative, and {bound:.3g} is allowed"

    def lower(self, model: nn.Module, net: Net) -> TracedModule | None:
        """The lowered network, or nothing where there is no graph of it; the one given stays as it was."""
        before = fingerprint(model)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            lowered = vx.lower(vx.trace(model, input_size=(3, *net.size)), net.target)
        except (TraceError, ModelError) as error:
            note(str(error))
            self.refused[str(error)[:200]] += 1
            return None
        assert_same_module(model, before)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        self.lowered += 1
        steps = vx.ledger(lowered).steps
        start = next(place for place, step in enumerate(steps) if step.name == "evaluation")
        self.merged += any(step.matched for step in steps[start + 1 :])
        self.before += steps[start].nodes
        self.after += steps[-1].nodes
        return lowered

    def judge(self) -> None:
        """The whole run: nearly every network was lowered, there was much to merge, most kinds were met."""
        assert self.lowered >= 0.95 * self.drawn, self.refused
        assert self.merged > 0.5 * self.lowered
        assert self.after < 0.95 * self.before
        assert len(self.kinds) > 0.7 * len(KINDS), KINDS.keys() - self.kinds.keys()


SETTINGS = settings(deadline=None, database=None, print_blob=False, suppress_health_check=list(HealthCheck))


def test_random_networks_lower_right() -> None:
    tally = Tally()

    @settings(SETTINGS, max_examples=8, derandomize=True)
    @given(nets())
    def run(net: Net) -> None:
        tally.check(net)

    run()
    assert tally.lowered == tally.drawn, tally.refused
    assert tally.merged
    assert tally.after < tally.before


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_many_random_networks_lower_right(part: int) -> None:
    """A twentieth of 2,000 networks."""
    tally = Tally()

    @seed(part)
    @settings(SETTINGS, max_examples=100)
    @given(nets())
    def run(net: Net) -> None:
        tally.check(net)

    run()
    tally.judge()
