"""Figures as lines of a table, and what they come to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lowering_measure import SIDES, Figures, Pair
from lowering_models import FRESH, MODELS

HEADER = (
    "model",
    "family",
    "nodes",
    "ratio",
    "layers",
    "ratio of layers",
    "MiB moved",
    "ratio of bytes",
    "ms",
    "ratio of ms",
    "95 % interval",
    "difference",
)
FEWER = 0.75
"""The mean ratio that is aimed at, of nodes, layers and bytes."""
SLOWER = 1.03
"""Below this the interval of each model's latency is to lie."""


def line(figures: Figures) -> list[str]:
    """The cells of one model, ours before theirs; "-" is what was not measured or could not be."""
    moved = [None if value is None else f"{value / 2**20:.1f}" for value in figures.bytes]
    found = figures.latency
    latency = ["-", "-", "-"]
    if found:
        latency = [
            f"{1000 * found.ours:.2f} / {1000 * found.theirs:.2f}",
            f"{found.ratio:.3f}",
            f"{found.low:.3f} to {found.high:.3f}",
        ]
    return [
        figures.model,
        MODELS.get(figures.model, "-"),
        _both(figures.nodes),
        _ratio_text(figures.nodes),
        _both(figures.layers),
        _ratio_text(figures.layers),
        _both(moved),
        _ratio_text(figures.bytes),
        *latency,
        "-" if figures.difference is None else f"{figures.difference:.1e}",
    ]


def ratio(pair: Pair) -> float | None:
    """Ours over theirs, where both are there."""
    first, second = pair
    return None if first is None or not second else first / second


def summary(all_figures: Sequence[Figures]) -> list[str]:
    """What the ratios come to, and which model misses a bound."""
    said = []
    for what in ("nodes", "layers", "bytes"):
        ratios = {f.model: r for f in all_figures if (r := ratio(getattr(f, what))) is not None}
        if ratios:
            mean, worst = statistics.mean(ratios.values()), max(ratios, key=ratios.__getitem__)
            said.append(
                f"{what}: mean ratio {mean:.3f} over {len(ratios)} models, {_bound(mean <= FEWER)} {FEWER}; "
                f"the largest {ratios[worst]:.3f}, {worst}"
            )
    timed = {f.model: f.latency for f in all_figures if f.latency}
    if timed:
        mean = statistics.geometric_mean(latency.ratio for latency in timed.values())
        slow = [f"{name} ({found.high:.3f})" for name, found in timed.items() if found.high >= SLOWER]
        said.append(
            f"latency: geometric mean {mean:.3f} over {len(timed)} models, {_bound(mean < 1)} 1; "
            f"interval not below {SLOWER}: {', '.join(slow) or 'none'}"
        )
    differences = [f.difference for f in all_figures if f.difference is not None]
    if differences:
        said.append(f"largest difference of the logits: {max(differences):.1e} of the largest logit")
    return said


def remarks(all_figures: Sequence[Figures], opset: int) -> list[str]:
    """Each failure as a line, each file that is in another opset than was asked for, and each model whose
    norms are not random.
    """
    said = []
    for figures in all_figures:
        if figures.model in FRESH:
            said.append(f"{figures.model}: fresh norms: {FRESH[figures.model]}")
        for side, written in zip(SIDES, figures.opsets, strict=True):
            if written not in (None, opset):
                said.append(f"{figures.model}: {side}: written in opset {written}")
        said += [f"{figures.model}: {what}: {reason}" for what, reason in figures.failed.items()]
    return said


def _bound(held: bool) -> str:
    return "within" if held else "not within"


def _both(pair: Sequence[object]) -> str:
    if all(value is None for value in pair):
        return "-"
    return " / ".join("failed" if value is None else str(value) for value in pair)


def _ratio_text(pair: Pair) -> str:
    found = ratio(pair)
    return "-" if found is None else f"{found:.3f}"
