"""The ledger: what each step from the training graph to the engine did, and how its result was checked.

It is plain data, written to a bundle's manifest and read back on a machine without torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vmkd_fx.table import in_billions, in_millions, table


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
        refused: sites left alone, each with its reason.
        nodes, parameters, multiply_adds: of the graph after the step; None where it does not apply.
        error: largest absolute difference to the step before over the largest absolute value; None if not
            run.
        tolerance: the bound that `error` was held to.
        checked: how the error was measured ("float64, randomised parameters", "ONNX Runtime", "built, not
            run").
    """

    name: str
    detail: str = ""
    matched: int | None = None
    refused: tuple[Refusal, ...] = ()
    nodes: int | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    error: float | None = None
    tolerance: float | None = None
    checked: str = ""


@dataclass(frozen=True)
class Ledger:
    """The steps in the order in which they ran, and the measured accuracies by kind of prediction."""

    steps: tuple[Step, ...] = ()
    accuracy: dict[str, float] = field(default_factory=dict)

    def add(self, *steps: Step) -> Ledger:
        """The same ledger with `steps` at its end."""
        return replace(self, steps=self.steps + steps)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, as they stand in a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Ledger:
        """The inverse of `to_json`."""
        steps = tuple(
            Step(**{**step, "refused": tuple(Refusal(**refusal) for refusal in step["refused"])})
            for step in data["steps"]
        )
        return cls(steps, dict(data["accuracy"]))

    def __str__(self) -> str:
        header = ("step", "sites", "nodes", "parameters", "multiply-adds", "error", "checked", "what")
        rows = [_row(step) for step in self.steps]
        lines = [table(header, rows, right=header[1:6])]
        for step in self.steps:
            lines += _refusals(step)
        if self.accuracy:
            values = ", ".join(f"{name} {100 * value:.2f} %" for name, value in self.accuracy.items())
            lines.append(f"accuracy by prediction: {values}")
        return "\n".join(lines)


def _row(step: Step) -> tuple[object, ...]:
    error = None if step.error is None else f"{step.error:.1e}"
    sizes = (in_millions(step.parameters), in_billions(step.multiply_adds))
    return (step.name, step.matched, step.nodes, *sizes, error, step.checked, step.detail)


def _refusals(step: Step, most: int = 3) -> list[str]:
    """The first few sites that a step left alone, and how many more there are."""
    shown = [f"{step.name} left {refusal.node} alone: {refusal.reason}" for refusal in step.refused[:most]]
    more = len(step.refused) - most
    return [*shown, f"{step.name} left {more} more sites alone"] if more > 0 else shown
