"""What a distillation method is: settings, edits of the student, features of the teachers, terms of the
loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vmkd_fx.distill.methods.pairs import Wanted, grid_of
from vmkd_fx.distill.methods.settings import whole
from vmkd_fx.errors import MatchError, ModelError, RecipeError
from vmkd_fx.graph.edit import LOGITS
from vmkd_fx.graph.parts import Anatomy, Block
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.injections import Injected, inject


@dataclass(frozen=True)
class Source:
    """A student or a teacher as a method sees it before training.

    Attributes:
        name: of the model.
        input_size: (C, H, W) of the images that it is given.
        known: its anatomy; None for a teacher of which only logits are read.
    """

    name: str
    input_size: tuple[int, int, int]
    known: Anatomy | None = None

    @property
    def anatomy(self) -> Anatomy:
        """Its anatomy, which whoever reads features has asked for."""
        assert self.known is not None, f"the anatomy of {self.name} was not read"
        return self.known


@dataclass(frozen=True)
class Batch:
    """What a step of training computed.

    Attributes:
        outputs: of the student, by name; "logits" (B, C) is its class head.
        teachers: the outputs of each teacher: "logits", and the features that were asked for.
        target: labels (B,), or soft labels (B, C).
        epoch: from 0; None where nobody said.
        epochs: how many there will be; None where nobody said.
    """

    outputs: Mapping[str, Tensor]
    teachers: Sequence[Mapping[str, Tensor]]
    target: Tensor
    epoch: int | None = None
    epochs: int | None = None


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
    def reads_logits(self) -> bool:
        """Whether teacher and student must know the same classes."""
        return True

    @property
    def needs_epoch(self) -> bool:
        """Whether its terms change with the epoch."""
        return False

    def missing(self, module: TracedModule, known: Anatomy) -> str | None:
        """The requirement that a student does not meet; None where it meets all."""
        try:
            inject(module, self.changes(known), known)
            self.check_student(module, known)
        except (MatchError, RecipeError, ModelError) as error:
            return str(error)
        return None

    def check_student(self, module: TracedModule, known: Anatomy) -> None:
        """Refuse a student that has nothing to attach the method to.

        Raises:
            MatchError, RecipeError: what is missing.
        """

    def check_run(self, teachers: int, epochs: int | None) -> None:
        """Refuse a number of teachers, or a length of the training, that the settings do not fit.

        Raises:
            RecipeError: what does not fit, and what would.
        """
        if teachers < 1:
            raise RecipeError(
                f"method {self.name!r} needs a teacher: wrap(student, {self.name!r}, teachers=[...]), in a "
                "recipe teachers: [{model: ...}]"
            )
        if self.feature_teacher is not None and self.feature_teacher >= teachers:
            raise RecipeError(
                f"{self.name}: teacher={self.feature_teacher}, and there are {teachers}, counted from 0"
            )

    def changes(self, known: Anatomy) -> list[Injected]:
        """Edits that become part of the student's own function, in order."""
        return []

    def wanted(self, student: Source, teacher: Source) -> dict[str, Wanted]:
        """What to read in the feature teacher, by name.

        Raises:
            MatchError: the teacher has no such feature, or none that fits the student's.
        """
        return {}

    def injections(self, student: Source, teachers: Sequence[Source]) -> list[Injected]:
        """Edits that only training needs, in order."""
        return []

    def start(self, student: TracedModule, teachers: Sequence[nn.Module]) -> None:
        """What is done once to the student, edited and untrained, before the first step."""

    def terms(self, batch: Batch) -> list[Term]:
        """What it adds to the loss."""
        return []


@dataclass(frozen=True)
class FeatureMethod(Method):
    """A method that reads features of one teacher, and no logits.

    Attributes:
        teacher: index of the teacher whose features are read.
    """

    teacher: int = 0

    fits: ClassVar[str] = "blocks whose patches stand in a grid"

    def __post_init__(self) -> None:
        whole(self, "teacher")

    @property
    def feature_teacher(self) -> int:
        return self.teacher

    @property
    def reads_logits(self) -> bool:
        return False


def on_the_grid_of(mine: Block, student: Source, place: str, other: Block, teacher: Source) -> Wanted:
    """A feature of the teacher's block `other`, brought to the grid of the student's block `mine`."""
    return Wanted(
        place,
        other.layout,
        other.prefix_tokens,
        grid_of(other.tokens, teacher.input_size, f"{other.path} of {teacher.name}"),
        grid_of(mine.tokens, student.input_size, mine.path),
    )
