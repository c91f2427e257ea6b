"""FitNet and MGD: the teacher's feature as a hint, or generated from a masked one of the student's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vmkd_fx.distill.losses import FitNetLoss, MGDLoss
from vmkd_fx.distill.losses.fitnet import REDUCTIONS
from vmkd_fx.distill.methods.base import Batch, FeatureMethod, Source, Term, on_the_grid_of
from vmkd_fx.distill.methods.pairs import Wanted, grid_of
from vmkd_fx.distill.methods.settings import choice, not_negative, positive
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.heads.projections import MASKED, MGDGenerator
from vmkd_fx.passes.hints import FITNET, MGD, FitNetConfig, MgdConfig
from vmkd_fx.passes.injections import Injected


@dataclass(frozen=True)
class FitNet(FeatureMethod):
    """L = L_class + weight L_hint, the hint a block of the teacher (Romero et al., 2015, Eq. 3).

    The paper trains on the hint first and on the classes afterwards; here both at once, as is usual now.

    Attributes:
        position: the student's block that is guided, by index or by its share of the depth.
        hint: the teacher's block; None for the one at the same place.
        weight: of the hint loss.
        reduction: "elements" or "sample", see `FitNetLoss`.
    """

    position: int | str = "1/2"
    hint: int | str | None = None
    weight: float = 1.0
    reduction: str = "elements"

    paper: ClassVar[str] = "FitNets, Romero et al., 2015"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("reduction", self.reduction, REDUCTIONS)
        positive(self, "weight")

    def check_student(self, module: TracedModule, known: Anatomy) -> None:
        block = known.blocks[known.position(self.position)]
        grid_of(block.tokens, module.info.need_input_size(), block.path)

    def wanted(self, student: Source, teacher: Source) -> dict[str, Wanted]:
        mine = student.anatomy.blocks[student.anatomy.position(self.position)]
        other = teacher.anatomy.blocks[self._hint(teacher.anatomy)]
        return {f"{FITNET}/hint": on_the_grid_of(mine, student, other.output, other, teacher)}

    def injections(self, student: Source, teachers: Sequence[Source]) -> list[Injected]:
        theirs = teachers[self.teacher].anatomy
        return [Injected(FITNET, FitNetConfig(self.position, theirs.blocks[self._hint(theirs)].channels))]

    def terms(self, batch: Batch) -> list[Term]:
        name = f"{FITNET}/hint"
        value = FitNetLoss(self.reduction)(batch.outputs[name], batch.teachers[self.teacher][name])
        return [Term(f"{self.name}/hint", value, self.weight)]

    def _hint(self, teacher: Anatomy) -> int:
        return teacher.position(self.position if self.hint is None else self.hint)


@dataclass(frozen=True)
class Mgd(FeatureMethod):
    """L = L_class + alpha L_gen: the teacher's last feature, generated from the student's (Yang et al.,
    2022).

    Attributes:
        alpha: weight of the generation, 7e-5 for classification.
        ratio: λ, the share of the student's feature that is masked.
        along: what is masked: "channels" (classification) or "locations".
    """

    alpha: float = 7e-5
    ratio: float = 0.15
    along: str = "channels"

    paper: ClassVar[str] = "MGD, Yang et al., 2022"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("along", self.along, MASKED)
        not_negative(self, "alpha")
        MGDGenerator(1, 1, self.ratio)

    def check_student(self, module: TracedModule, known: Anatomy) -> None:
        block = known.blocks[known.position(-1)]
        grid_of(block.tokens, module.info.need_input_size(), block.path)

    def wanted(self, student: Source, teacher: Source) -> dict[str, Wanted]:
        mine, other = student.anatomy.blocks[-1], teacher.anatomy.blocks[-1]
        return {f"{MGD}/feature": on_the_grid_of(mine, student, teacher.anatomy.final, other, teacher)}

    def injections(self, student: Source, teachers: Sequence[Source]) -> list[Injected]:
        mine = student.anatomy.blocks[-1]
        grid = grid_of(mine.tokens, student.input_size, mine.path)
        dim = teachers[self.teacher].anatomy.blocks[-1].channels
        return [Injected(MGD, MgdConfig(dim, grid, self.ratio, self.along))]

    def terms(self, batch: Batch) -> list[Term]:
        generated = batch.outputs[f"{MGD}/generated"].flatten(2).transpose(1, 2)
        value = MGDLoss(self.alpha)(generated, batch.teachers[self.teacher][f"{MGD}/feature"])
        return [Term(f"{self.name}/generation", value)]
