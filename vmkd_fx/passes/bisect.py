"""`bisect`: which pass of a lowering is wrong, at which of its sites, and which node then differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vmkd_fx.errors import PassError, VerificationError
from vmkd_fx.frames import Frames, parse_frames
from vmkd_fx.graph.in_double import double_
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.verify import logits_of, relative_error
from vmkd_fx.passes.compare import Difference, bisect_graphs
from vmkd_fx.passes.evaluation import tidied
from vmkd_fx.passes.frames import feed, frames_for
from vmkd_fx.passes.lowering import chosen_passes
from vmkd_fx.passes.pipeline import strip
from vmkd_fx.passes.proof import Proof, first_wrong
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite
from vmkd_fx.steps import Site
from vmkd_fx.table import table
from vmkd_fx.target import Target, parse_target


@dataclass(frozen=True)
class Trial:
    """How one pass did.

    Attributes:
        name: of the pass.
        sites: that it rewrote.
        error: of its result, on the twin with random parameters in float64; None where nothing ran.
        bound: that `error` was held to.
        site: the first that makes the result wrong; None for a pass that is right, or that failed.
        site_error: with the sites up to that one.
        difference: the first node that differs with that site from the graph without it.
        failure: what the pass raised.
    """

    name: str
    sites: int = 0
    error: float | None = None
    bound: float | None = None
    site: Site | None = None
    site_error: float | None = None
    difference: Difference | None = None
    failure: str = ""

    @property
    def good(self) -> bool:
        return self.site is None and not self.failure


@dataclass(frozen=True)
class Bisection:
    """The trials of all passes in their order; `bad` is the first that is wrong, if one is."""

    model: str
    trials: tuple[Trial, ...]

    @property
    def bad(self) -> Trial | None:
        return next((trial for trial in self.trials if not trial.good), None)

    def __str__(self) -> str:
        header = ("pass", "matched", "error", "bound", "verdict")
        lines = [table(header, map(_row, self.trials), right=header[1:4])]
        if self.bad is None:
            return "\n".join((*lines, f"every pass is right on {self.model}"))
        return "\n".join((*lines, *_story(self.bad, self.model)))


def bisect(
    model: Any,
    target: str = "onnxruntime",
    passes: Sequence[str | LoweringPass] | None = None,
    *,
    predict: str = "class",
    frames: str | Frames | None = None,
) -> Bisection:
    """Run the passes one by one and find the first that is wrong, its first wrong site and the node.

    What a wrong pass did is left out for the passes after it, as far as it is wrong; all of what a pass did
    that failed.

    Args:
        model, target, passes, predict, frames: as for `lower`; the model is left as it was.

    Raises:
        PassError: the passes are in an order that cannot work.
        UnknownNameError: there is no such target, pass or kind of frames.
        TraceError: the model has no graph of ATen operators.
    """
    goal, chosen = parse_target(target), chosen_passes(passes)
    source = strip(model, predict, copy=True).eval()
    wanted = None if frames is None else frames_for(source.info, parse_frames(frames))
    proof, _ = Proof.of(double_(source))
    if wanted is not None:
        feed(proof, wanted, goal)
    return Bisection(source.info.name, tuple(_tried(proof, lowering_pass, goal) for lowering_pass in chosen))


def _tried(proof: Proof, lowering_pass: LoweringPass, target: Target) -> Trial:
    """Try a pass, and leave what it did right in `proof`."""
    try:
        step, _ = proof.run(lowering_pass, target)
        return Trial(step.name, step.matched or 0, step.error, step.tolerance)
    except VerificationError:
        trial = _examined(proof, lowering_pass, target)
        proof.run(lowering_pass, target, keep_going=True)
        return trial
    except PassError as error:
        return Trial(lowering_pass.name, failure=str(error))


def _examined(proof: Proof, lowering_pass: LoweringPass, target: Target) -> Trial:
    """Why the twin computes something else after a pass."""

    def attempt(most: int) -> tuple[Rewrite, float]:
        twin, rewrite = _rewritten(proof.twin, lowering_pass, target, most)
        return rewrite, relative_error(proof.logits, logits_of(twin, proof.images))

    bound = proof.bound()
    rewrite, error = attempt(2**31)
    name, site_error = first_wrong(attempt, bound)
    place, site = next((place, site) for place, site in enumerate(rewrite.sites) if site.node == name)
    right, wrong = (_rewritten(proof.twin, lowering_pass, target, most)[0] for most in (place, place + 1))
    difference = bisect_graphs(right, wrong, proof.images)
    return Trial(lowering_pass.name, len(rewrite.sites), error, bound, site, site_error, difference)


@torch.no_grad()
def _rewritten(
    module: TracedModule, lowering_pass: LoweringPass, target: Target, most: int
) -> tuple[TracedModule, Rewrite]:
    """A copy of the graph with the first `most` sites of a pass rewritten."""
    copy = fork(module, to_edit=True, throwaway=True)
    rewrite = Rewrite(copy, target, most=most)
    lowering_pass.run(rewrite)
    return tidied(copy), rewrite


def _row(trial: Trial) -> tuple[object, ...]:
    error, bound = (None if value is None else f"{value:.1e}" for value in (trial.error, trial.bound))
    verdict = "failed" if trial.failure else "right" if trial.site is None else "WRONG"
    return (
        trial.name,
        trial.sites,
        error,
        bound,
        "nothing to do" if trial.good and not trial.sites else verdict,
    )


def _story(trial: Trial, model: str) -> list[str]:
    if trial.site is None:
        return [f"the first bad pass is {trial.name}: {trial.failure}"]
    site = trial.site
    place = f"{site.node}{f' in {site.where}' if site.where else ''}"
    lines = [
        f"the first bad pass on {model} is {trial.name}",
        f"its first bad site is {place}{f' ({site.what})' if site.what else ''}: "
        f"with it the logits differ by {trial.site_error:.3g} relative, {trial.bound:.3g} is allowed",
    ]
    return lines if trial.difference is None else [*lines, str(trial.difference)]
