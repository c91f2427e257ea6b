"""Run a lowering pass and prove it on its result, or find the site that is wrong.

Two graphs go through every pass: the model's own, and a twin whose per-channel parameters and statistics are
random, for a fresh norm (weight one, bias zero) hides a wrong merge. The twin is run before and after, in
float64 and on two images, so that nothing mixes samples unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from vmkd_fx.errors import PassError, VerificationError, VmkdError
from vmkd_fx.graph.in_double import floats, name_double_
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.verify import TOLERANCE, logits_of, probe_images, randomise_, relative_error, rounding_of
from vmkd_fx.passes.evaluation import specialise_to_evaluation, tidied
from vmkd_fx.passes.mixing.operators import keep_whole
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite
from vmkd_fx.steps import Refusal, Step
from vmkd_fx.target import Target

_LOOSEST = 1e-8
"""A model that magnifies rounding further is not what a proof can be held to."""

PROVED = "float64, randomised parameters"


@dataclass
class Proof:
    """A graph on its way down, and the twin that proves each step.

    Attributes:
        work: the model's own graph.
        twin: the same with random parameters.
        images: that the twin is run on.
        logits: what the twin makes of them.
        error: of the way so far into ATen operators.
        model: the twin before any pass, and its images: what rounding does to them is the bound's measure.
    """

    work: TracedModule
    twin: TracedModule
    images: torch.Tensor
    logits: torch.Tensor
    error: float
    model: tuple[TracedModule, torch.Tensor]
    _rounding: float | None = None

    @classmethod
    def of(cls, source: TracedModule) -> tuple[Proof, int]:
        """Begin with `source`, in float64; also how many of its nodes handed their input on."""
        keep_whole(source)
        work, idle = specialise_to_evaluation(source)
        images = probe_images(source)
        twin, expected = deepcopy(work), randomise_(deepcopy(source))
        random = dict(floats(expected, every_name=True))  # export goes by another name of a shared one
        for name, tensor in floats(twin):
            if name in random:
                tensor.data = random[name].detach().clone()
        before, logits = logits_of(expected, images), logits_of(twin, images)
        proof = cls(work, twin, images, logits, 0.0, (twin, images))
        proof.error, _ = proof.hold(before, logits, f"specialising {source.info.name} to evaluation")
        for module in (work, twin):
            name_double_(module)
            module.recompile()
        proof.logits, proof._rounding = logits_of(twin, images), None  # casts to float32 round no more
        return proof, idle

    def run(self, lowering_pass: LoweringPass, target: Target, keep_going: bool = False) -> tuple[Step, bool]:
        """Run a pass on both graphs; its row of the ledger, and whether it changed anything.

        Raises:
            VerificationError: the twin computes something else afterwards; names pass, site and error.
            PassError: the pass failed.
        """
        rolled_back: dict[str, Refusal] = {}
        while True:
            spared = frozenset(rolled_back)
            work, rewrite = _rewritten(lowering_pass, self.work, target, spared=spared)
            refused = tuple({**rewrite.refusals, **rolled_back}.values())
            step = Step(
                lowering_pass.name, _summary(rewrite), len(rewrite.sites), tuple(rewrite.sites), refused
            )
            if not rewrite.sites:
                return replace(step, checked="unchanged"), False
            twin, _ = _rewritten(lowering_pass, self.twin, target, spared=spared)
            logits, error = self._outcome(twin)
            bound = TOLERANCE if error <= TOLERANCE else self.bound()
            if error <= bound:
                self.work, self.twin, self.logits = work, twin, logits
                return replace(step, error=error, tolerance=bound, checked=PROVED), True
            site, found = self._first_wrong(lowering_pass, target, spared, bound)
            message = f"differs from the graph before by {found:.3g} relative, at most {bound:.3g} is allowed"
            if not keep_going:
                raise VerificationError(
                    f"pass {lowering_pass.name} on {self.work.info.name}, at {site}: {message}; nothing was "
                    "changed in the model that was given, and keep_going=True leaves such a site alone"
                )
            rolled_back[site] = Refusal(site, f"rolled back: {message}")

    def hold(self, before: torch.Tensor, after: torch.Tensor, what: str) -> tuple[float, float]:
        """The error of `after` and the bound that it keeps.

        Raises:
            VerificationError: it does not keep it.
        """
        error = relative_error(before, after)
        bound = TOLERANCE if error <= TOLERANCE else self.bound()
        if not error <= bound:
            raise VerificationError(
                f"{what}: the rewritten graph differs from the one before by {error:.3g} relative, and at "
                f"most {bound:.3g} is allowed; nothing was changed in the model that was given"
            )
        return error, bound

    def bound(self) -> float:
        """1e-12, or a hundred times what the last bit of each weight makes in the model before any pass, to
        1e-8 at most: a pass that makes a graph worse at rounding gets no looser bound for it.
        """
        if self._rounding is None:
            self._rounding = rounding_of(*self.model)
        return min(max(TOLERANCE, 100 * self._rounding), _LOOSEST)

    def _outcome(self, twin: TracedModule) -> tuple[torch.Tensor, float]:
        """What a rewritten twin computes and its error, infinite where it does not run."""
        try:
            logits = logits_of(twin, self.images)
        except Exception:
            return self.logits, float("inf")
        return logits, relative_error(self.logits, logits)

    def _first_wrong(
        self, lowering_pass: LoweringPass, target: Target, spared: frozenset[str], bound: float
    ) -> tuple[str, float]:
        """The first site whose rewrite breaks the bound, and the error with it, by bisection."""

        def attempt(most: int) -> tuple[Rewrite, float]:
            twin, rewrite = _rewritten(lowering_pass, self.twin, target, spared=spared, most=most)
            return rewrite, self._outcome(twin)[1]

        return first_wrong(attempt, bound)


def first_wrong(attempt: Callable[[int], tuple[Rewrite, float]], bound: float) -> tuple[str, float]:
    """Which of the sites that `attempt` rewrites is the first with which the error exceeds `bound`."""
    rewrite, error = attempt(2**31)
    right, wrong = 0, len(rewrite.sites)
    while wrong - right > 1:
        middle = (right + wrong) // 2
        _, found = attempt(middle)
        if found <= bound:
            right = middle
        else:
            wrong, error = middle, found
    return rewrite.sites[wrong - 1].node, error


@torch.no_grad()
def _rewritten(
    lowering_pass: LoweringPass,
    module: TracedModule,
    target: Target,
    *,
    spared: frozenset[str] = frozenset(),
    most: int | None = None,
) -> tuple[TracedModule, Rewrite]:
    """A copy of the graph over the same tensors, rewritten."""
    copy = fork(module, to_edit=True, throwaway=True)
    rewrite = Rewrite(copy, target, spared=spared, most=most)
    try:
        lowering_pass.run(rewrite)
        copy.graph.lint()
    except VmkdError:
        raise
    except Exception as error:
        last = f" at {rewrite.sites[-1].node}" if rewrite.sites else ""
        raise PassError(f"pass {lowering_pass.name} on {module.info.name} failed{last}: {error!r}") from error
    return tidied(copy) if rewrite.sites else copy, rewrite


def _summary(rewrite: Rewrite) -> str:
    """What was done at how many sites, the commonest first."""
    counts: dict[str, int] = {}
    for site in rewrite.sites:
        counts[site.what] = counts.get(site.what, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {what}".strip() for what, count in ordered)
