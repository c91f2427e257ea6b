"""RIFormer: no token mixers, but a teacher's whose mixers are imitated (Wang et al., 2023)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor, nn

from vmkd_fx.distill.losses import ModuleImitationLoss, ModuleImitationParts, SoftDistillation
from vmkd_fx.distill.losses.relation import MAX_BYTES
from vmkd_fx.distill.methods.base import Batch, Method, Source, Term
from vmkd_fx.distill.methods.pairs import Wanted, partner, same_locations, spread
from vmkd_fx.distill.methods.settings import not_negative, positive, whole
from vmkd_fx.errors import RecipeError
from vmkd_fx.graph.edit import LOGITS
from vmkd_fx.graph.parts import Anatomy, Block
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.affine_mixer import NAME as AFFINE
from vmkd_fx.passes.affine_mixer import AffineConfig, copy_teacher_weights
from vmkd_fx.passes.imitation import NAME, ImitationConfig, work_of
from vmkd_fx.passes.injections import Injected

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RIFormer(Method):
    """L = L_soft + λ1 L_in + λ2 L_out + λ3 L_rel (Eq. 9), without labels.

    Attributes:
        replace: whether the student's token mixers are replaced by affines, where it has any
            (`riformer_s12` has none).
        layers: how many blocks imitate, spread over the stages (4 or 6 in table 4), or their indices.
        feature_epochs, relation_epochs: how long L_in and L_out, and L_rel, count from the start (table 4):
            epochs, or a share of the run as "2/3". The defaults are the best row's 80 and 20 of 120.
        input_weight, output_weight, relation_weight: λ1 to λ3; the paper does not print them.
        temperature: of the soft distillation.
        labels: weight of the loss to the labels; 0 leaves them out (guideline 1).
        max_bytes: what two relation matrices may take.
        teacher: index of the teacher that is imitated.
        teacher_weights: whether the student starts from the teacher's weights where name and shape fit, all
            but the mixers (guideline 5).
    """

    replace: bool = True
    layers: int | tuple[int, ...] = 4
    feature_epochs: int | str = "2/3"
    relation_epochs: int | str = "1/6"
    input_weight: float = 1.0
    output_weight: float = 1.0
    relation_weight: float = 1.0
    temperature: float = 1.0
    labels: float = 0.0
    max_bytes: int = MAX_BYTES
    teacher: int = 0
    teacher_weights: bool = True

    paper: ClassVar[str] = "RIFormer, Wang et al., 2023"
    fits: ClassVar[str] = "MetaFormer-like blocks: a norm and a token mixer, then channels"

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        positive(self, "temperature", "max_bytes")
        not_negative(self, "input_weight", "output_weight", "relation_weight", "labels")
        whole(self, "teacher")
        for name in ("feature_epochs", "relation_epochs"):
            _share(self.name, name, getattr(self, name))

    @property
    def class_share(self) -> float:
        return self.labels

    @property
    def feature_teacher(self) -> int:
        return self.teacher

    @property
    def needs_epoch(self) -> bool:
        return True

    def check_run(self, teachers: int, epochs: int | None) -> None:
        super().check_run(teachers, epochs)
        for name in ("feature_epochs", "relation_epochs"):
            window(self.name, name, getattr(self, name), epochs)

    def check_student(self, module: TracedModule, known: Anatomy) -> None:
        for index in self._layers(known):
            work_of(known.blocks[index])

    def changes(self, known: Anatomy) -> list[Injected]:
        mixes = any(branch.mixing.mixes is not False for block in known.blocks for branch in block.branches)
        return [Injected(AFFINE, AffineConfig())] if self.replace and mixes else []

    def start(self, student: TracedModule, teachers: Sequence[nn.Module]) -> None:
        if not self.teacher_weights:
            return
        copied, rest = copy_teacher_weights(student, teachers[self.teacher])
        _logger.info("%s: %d weights start as the teacher's", self.name, len(copied))
        for name, reason in rest:
            _logger.info("%s: %s keeps its own start: %s", self.name, name, reason)

    def wanted(self, student: Source, teacher: Source) -> dict[str, Wanted]:
        found = {}
        for place, (mine, other) in enumerate(self._pairs(student.anatomy, teacher.anatomy)):
            same_locations(mine, other, teacher.name, "module imitation")
            for name, where in (("input", other.output), ("output", work_of(other))):
                found[f"{NAME}/{name}_{place}"] = Wanted(where, other.layout, other.prefix_tokens)
        return found

    def injections(self, student: Source, teachers: Sequence[Source]) -> list[Injected]:
        theirs = teachers[self.teacher].anatomy
        layers = self._layers(student.anatomy)
        dims = tuple(theirs.blocks[partner(student.anatomy, i, theirs)].channels for i in layers)
        return [Injected(NAME, ImitationConfig(layers, dims))]

    def terms(self, batch: Batch) -> list[Term]:
        theirs = batch.teachers[self.teacher]
        soft = SoftDistillation(self.temperature)(batch.outputs[LOGITS], theirs[LOGITS]).mean()
        inputs, outputs = _layers_of(batch.outputs, "input"), _layers_of(batch.outputs, "output")
        left, mixed = _layers_of(theirs, "input"), _layers_of(theirs, "output")
        # Projections whose term has ended still belong to the step: DistributedDataParallel waits for them.
        zero = soft.new_zeros(())
        idle = sum((feature.float().mean() for feature in (*inputs, *outputs)), zero) * 0
        parts = ModuleImitationParts(zero, zero, zero)
        features, relations = self._counts("feature_epochs", batch), self._counts("relation_epochs", batch)
        if features or relations:
            related = _layers_of(batch.outputs, "relation")
            pairs = ((features, inputs, left), (features, outputs, mixed), (relations, related, left))
            loss = ModuleImitationLoss(
                self.input_weight, self.output_weight, self.relation_weight, self.max_bytes
            )
            parts = loss(*(side if counts else [] for counts, *sides in pairs for side in sides))
        return [
            Term(f"{self.name}/soft", soft),
            Term(f"{self.name}/input", parts.input + idle),
            Term(f"{self.name}/output", parts.output),
            Term(f"{self.name}/relation", parts.relation),
        ]

    def _layers(self, student: Anatomy) -> tuple[int, ...]:
        if isinstance(self.layers, int):
            return spread(student, self.layers)
        return tuple(student.position(index) for index in self.layers)

    def _pairs(self, student: Anatomy, teacher: Anatomy) -> list[tuple[Block, Block]]:
        return [
            (student.blocks[index], teacher.blocks[partner(student, index, teacher)])
            for index in self._layers(student)
        ]

    def _counts(self, name: str, batch: Batch) -> bool:
        assert batch.epoch is not None
        return batch.epoch < window(self.name, name, getattr(self, name), batch.epochs)


def _layers_of(outputs: Mapping[str, Tensor], kind: str) -> list[Tensor]:
    """The features of one kind, layer by layer."""
    return [value for name, value in outputs.items() if name.startswith(f"{NAME}/{kind}_")]


def window(method: str, name: str, value: int | str, epochs: int | None) -> int:
    """A number of epochs, given as such or as a share of the run.

    Raises:
        RecipeError: it is longer than the run, or a share of a run whose length nobody said.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0 or (epochs is not None and value > epochs):
            raise RecipeError(f"{method}: {name} is {value} and the training has {epochs} epochs")
        return value
    share = _share(method, name, value)
    if epochs is None:
        raise RecipeError(
            f"{method}: {name} is {value} of the training; say how long that is, wrap(..., epochs=120), "
            f"or give a number of epochs, {name}=80"
        )
    return round(share * epochs)


def _share(method: str, name: str, value: int | str) -> Fraction:
    try:
        share = Fraction(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return Fraction(0)
        if isinstance(value, str) and 0 <= share <= 1:
            return share
    except (ValueError, TypeError, ZeroDivisionError):
        pass
    raise RecipeError(
        f"{method}: {name} is a number of epochs, or a share of the training as '2/3', got {value!r}"
    )
