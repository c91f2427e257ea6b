"""The ledger: what each step from the training graph to the engine did, and how its result was checked.

It is plain data, written to a bundle's manifest and read back on a machine without torch.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from vmkd_fx.table import in_billions, in_millions, table

WIDTH = 120


@dataclass(frozen=True)
class Site:
    """A place that a pass rewrote: the graph node, what was done, and the module that the node is in."""

    node: str
    what: str = ""
    where: str = ""


@dataclass(frozen=True)
class Refusal:
    """A site that a pass looked at and left alone: the graph node and the reason."""

    node: str
    reason: str


@dataclass(frozen=True)
class Step:
    """One row of the ledger.

    Attributes:
        name: the pass or stage ("strip", "channel_affine", "onnx", "engine", ...).
        detail: what it did, in words.
        matched: sites rewritten, where the step is a pass.
        sites: the rewritten ones, each with what was done.
        refused: sites left alone, each with its reason.
        nodes, parameters, multiply_adds: of the graph after the step; None where it does not apply.
        error: largest absolute difference to the step before over the largest absolute value; None if not
            run.
        tolerance: the bound that `error` was held to.
        agreement: share of images with the same highest logit as before the step; None if not measured.
        checked: how the error was measured ("float64, randomised parameters", "ONNX Runtime", "built, not
            run").
    """

    name: str
    detail: str = ""
    matched: int | None = None
    sites: tuple[Site, ...] = ()
    refused: tuple[Refusal, ...] = ()
    nodes: int | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    error: float | None = None
    tolerance: float | None = None
    checked: str = ""
    agreement: float | None = None


@dataclass(frozen=True)
class Ledger:
    """The steps in the order in which they ran, and the measured accuracies by kind of prediction."""

    steps: tuple[Step, ...] = ()
    accuracy: dict[str, float] = field(default_factory=dict)

    def add(self, *steps: Step) -> Ledger:
        """The same ledger with `steps` at its end."""
        return replace(self, steps=self.steps + steps)

    def __str__(self) -> str:
        return self.text()

    def text(self, *, every: bool = False) -> str:
        """A row a step, the totals, how it was checked, and what was left alone by reason, 120 columns wide.

        The sizes in a row are those after the step; the row above holds those before.

        Args:
            every: name each node that was left alone, and not only the first few of each reason.
        """
        lines = [*_rows(self.steps), *_totals(self.steps), *_checks(self.steps)]
        lines += _all_left(self.steps) if every else _left(self.steps)
        if self.accuracy:
            values = ", ".join(f"{name} {100 * value:.2f} %" for name, value in self.accuracy.items())
            lines.append(f"accuracy by prediction: {values}")
        return "\n".join(lines)


_HEADER = ("step", "matched", "left", "nodes", "parameters", "multiply-adds", "error", "bound")


def _rows(steps: Iterable[Step]) -> Iterator[str]:
    """The table, with what was done wrapped at its right."""
    steps = list(steps)
    header, ruler, *rows = table(_HEADER, map(_figures, steps), right=_HEADER[1:]).splitlines()
    edge = max(map(len, (header, ruler, *rows)))
    room = max(WIDTH - edge - 2, 20)
    yield f"{header:{edge}}  what"
    yield f"{ruler:{edge}}  {'-' * room}"
    for step, row in zip(steps, rows, strict=True):
        first, *more = textwrap.wrap(_what(step), room) or [""]
        yield f"{row:{edge}}  {first}".rstrip()
        yield from (f"{'':{edge}}  {line}" for line in more)


def _figures(step: Step) -> tuple[object, ...]:
    sizes = (step.nodes, in_millions(step.parameters), in_billions(step.multiply_adds))
    error, bound = (
        None if value is None else f"{value:.1e}" if value else "0" for value in (step.error, step.tolerance)
    )
    return (step.name, step.matched, len(step.refused) or None, *sizes, error, bound)


def _what(step: Step) -> str:
    words = [step.detail] if step.detail else ["nothing to do"] if step.matched == 0 else []
    if step.agreement is not None:
        words.append(f"top-1 as before on {100 * step.agreement:.2f} %")
    return "; ".join(words)


def _totals(steps: Iterable[Step]) -> list[str]:
    """What the graph has at the end of what it had at first."""
    sized = [step for step in steps if step.nodes is not None and step.multiply_adds is not None]
    if len(sized) < 2:
        return []
    first, last = sized[0], sized[-1]
    changes = (
        _change("nodes", first.nodes, last.nodes, str),
        _change("parameters", first.parameters, last.parameters, in_millions),
        _change("multiply-adds", first.multiply_adds, last.multiply_adds, in_billions),
    )
    return _wrapped(f"from {first.name} to {last.name}: {', '.join(changes)}")


def _change(name: str, before: int | None, after: int | None, shown: Any) -> str:
    if before is None or after is None or before == after:
        return f"{name} {shown(after)} (as before)"
    percent = f" ({100 * (after / before - 1):+.1f} %)" if before else ""
    return f"{name} {shown(before)} -> {shown(after)}{percent}"


def _checks(steps: Iterable[Step]) -> list[str]:
    """How the errors were measured, with the steps of which that holds."""
    ways: dict[str, list[str]] = {}
    for step in steps:
        if step.checked and step.checked != "unchanged":
            ways.setdefault(step.checked, []).append(step.name)
    return [line for way, names in ways.items() for line in _wrapped(f"checked, {way}: {', '.join(names)}")]


def _left(steps: Iterable[Step], most: int = 4) -> list[str]:
    """What steps left alone, by step and reason: how many sites, and the first few."""
    lines = []
    for step in steps:
        groups: dict[str, list[Refusal]] = {}
        for refusal in step.refused:
            groups.setdefault(_kind(refusal.reason), []).append(refusal)
        for kind, alike in sorted(groups.items(), key=lambda item: -len(item[1])):
            reason = alike[0].reason if len({refusal.reason for refusal in alike}) == 1 else kind
            named = ", ".join(refusal.node for refusal in alike[:most])
            more = f" and {len(alike) - most} more" if len(alike) > most else ""
            count = f"{len(alike)} site{'s' if len(alike) > 1 else ''}"
            lines += _wrapped(f"{step.name} left {count} alone: {reason}: {named}{more}")
    return lines


def _all_left(steps: Iterable[Step]) -> list[str]:
    return [
        line
        for step in steps
        for refusal in step.refused
        for line in _wrapped(f"{step.name} left {refusal.node} alone: {refusal.reason}")
    ]


def _kind(reason: str) -> str:
    """A reason without the numbers of the nodes and the measured values in it."""
    reason = re.sub(r"(?<=\w)_\d+\b", "", reason)
    return re.sub(r"\b\d+(\.\d+)?e[+-]?\d+\b|\b\d+\.\d+\b", "*", reason)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
