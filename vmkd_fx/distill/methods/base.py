"""What a distillation method is: settings, edits of the student, features of the teachers, terms of the
loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vmkd_fx.errors import RecipeError
from vmkd_fx.graph.edit import LOGITS
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.passes.injections import Injected

Places = Mapping[str, int | str]


@dataclass(frozen=True)
class Source:
    """A teacher as a method sees it before training.

    Attributes:
        name: of the model.
        known: its anatomy; None where only its logits are read.
        input_size: (C, H, W) of the images that it is given.
    """

    name: str
    known: Anatomy | None = None
    input_size: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Batch:
    """What a step of training computed.

    Attributes:
        outputs: of the student, by name; "logits" (B, C) is its class head.
        teachers: the outputs of each teacher: "logits", and the features that were asked for.
        target: labels (B,), or soft labels (B, C).
        epoch: from 0; None where nobody said.
    """

    outputs: Mapping[str, Tensor]
    teachers: Sequence[Mapping[str, Tensor]]
    target: Tensor
    epoch: int | None = None


@dataclass(frozen=True)
class Term:
    """A term of the loss: `weight` times `value`, a scalar."""

    name: str
    value: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Method:
    """A method with its settings; a subclass says what it does.

    Attributes:
        name: of the preset that it started from.
    """

    name: str

    paper: ClassVar[str] = ""
    fits: ClassVar[str] = "any classifier"

    @property
    def class_share(self) -> float:
        """The weight of the loss to the labels; of several methods the smallest counts."""
        return 1.0

    @property
    def class_output(self) -> str:
        """The output that learns from the labels."""
        return LOGITS

    @property
    def feature_teacher(self) -> int | None:
        """The index of the teacher whose features it reads; None where logits are all it reads."""
        return None

    @property
    def needs_epoch(self) -> bool:
        """Whether its terms change with the epoch."""
        return False

    def missing(self, known: Anatomy) -> str | None:
        """The requirement that a student does not meet; None where it meets all."""
        return None

    def check_run(self, teachers: int, epochs: int | None) -> None:
        """Refuse a number of teachers, or a length of the training, that the settings do not fit.

        Raises:
            RecipeError: what does not fit, and what would.
        """
        if teachers < 1:
            raise RecipeError(
                f"method {self.name!r} needs a teacher: wrap(student, {self.name!r}, teachers=[...])"
            )

    def changes(self, known: Anatomy) -> list[Injected]:
        """Edits that become part of the student's own function, in order."""
        return []

    def teacher_places(self, student: Anatomy, teacher: Anatomy) -> Places:
        """What to read in the feature teacher, by name; see `vmkd_fx.graph.places`."""
        return {}

    def injections(self, known: Anatomy, sources: Sequence[Source]) -> list[Injected]:
        """Edits that only training needs, in order."""
        return []

    def terms(self, batch: Batch) -> list[Term]:
        """What it adds to the loss."""
        raise NotImplementedError
