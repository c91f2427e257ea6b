"""Methods by name: what is injected into the student, and which losses train it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from vmkd_fx.distill.losses import CONFIDENCES
from vmkd_fx.errors import RecipeError, UnknownNameError
from vmkd_fx.passes.std_tokens import StdConfig

DISTILLATIONS = ("hard", "soft")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Method:
    """What a distillation consists of.

    Attributes:
        name: of the preset that it started from.
        tokens: whether spatial and channel tokens with a head for each teacher are injected (STD); without,
            the class head learns from the labels and the teachers alike.
        positions: the block that each teacher's tokens look at; one position serves all teachers.
        blocks: token blocks in a row, K of Eq. 5 and 6. The paper does not print it; 1 fits its sizes.
        distillation: "hard", the teacher's decision as a label, or "soft", the KL divergence at
            `temperature`.
        alpha: share of the distillation loss in L = (1 - alpha) L_class + alpha L_dist (Eq. 12). The paper
            does not print it; 0.5 is DeiT's.
        confidence: how teachers are weighted for each sample, see
            `vmkd_fx.distill.losses.confidence_weights`.
    """

    name: str
    tokens: bool = False
    positions: tuple[int | str, ...] = (-1,)
    blocks: int = 1
    distillation: str = "hard"
    temperature: float = 1.0
    alpha: float = 0.5
    confidence: str = "negative_entropy"

    def __post_init__(self) -> None:
        if self.distillation not in DISTILLATIONS:
            raise UnknownNameError("distillation", str(self.distillation), DISTILLATIONS)
        if self.confidence not in CONFIDENCES:
            raise UnknownNameError("confidence", str(self.confidence), CONFIDENCES)
        if not _is_number(self.alpha) or not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is the share of the distillation loss, from 0 to 1, got {self.alpha!r}")
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise RecipeError(f"temperature must be above 0, got {self.temperature!r}")
        if not isinstance(self.positions, (tuple, list)):
            raise RecipeError(f"positions is a list with one block for each teacher, got {self.positions!r}")
        object.__setattr__(self, "positions", tuple(self.positions))

    def std_config(self, teachers: int) -> StdConfig:
        """The settings of the token pass for so many teachers.

        Raises:
            RecipeError: the positions fit neither one nor that many teachers.
        """
        positions = self.positions * teachers if len(self.positions) == 1 else self.positions
        if len(positions) != teachers:
            raise RecipeError(
                f"{self.name} names {len(self.positions)} positions {self.positions} for {teachers} "
                "teachers; give one position for each teacher, or one for all"
            )
        return StdConfig(positions=positions, blocks=self.blocks)


PRESETS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("std", tokens=True),
        Method("std-intermediate", tokens=True, positions=("2/3", -1)),
        Method("hard"),
        Method("kd", distillation="soft", temperature=3.0),
    )
}
"""`std-intermediate`: the first teacher at two thirds of the depth, the second at the end (STD section
4.3).
"""


def resolve(preset: str, overrides: dict[str, Any] | None = None) -> Method:
    """A preset with some of its settings changed.

    Raises:
        UnknownNameError: there is no such preset.
        RecipeError: there is no such setting, or its value cannot be.
    """
    if preset not in PRESETS:
        raise UnknownNameError("method", preset, PRESETS)
    known = [field.name for field in fields(Method) if field.name != "name"]
    for key in overrides or {}:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise RecipeError(f"method {preset!r} has no setting {key!r}{hint} It has: {', '.join(known)}")
    return replace(PRESETS[preset], **(overrides or {}))
