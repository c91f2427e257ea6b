"""STD: spatial and channel tokens beside chosen blocks, with a head for each teacher (Li et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vmkd_fx.distill.methods.base import Batch, Source, Term
from vmkd_fx.distill.methods.logits import Distillation
from vmkd_fx.distill.methods.settings import not_negative
from vmkd_fx.errors import RecipeError
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.injections import Injected
from vmkd_fx.passes.std_tokens import INFORMATION, NAME, StdConfig, blocks_with_tokens


@dataclass(frozen=True)
class Std(Distillation):
    """L = (1 - alpha) L_class + alpha L_dist + information I(T_S; T_C) (Eq. 12 and Algorithm 1); each head
    learns from its own teacher (Eq. 11).

    Attributes:
        positions: the block that each teacher's tokens look at; one position serves all teachers.
        blocks: token blocks in a row, K of Eq. 5 and 6. The paper does not print it; 1 fits its sizes.
        alpha: the paper does not print it; 0.5 is DeiT's.
        tokens: "both", or "spatial" or "channel" alone (the paper's ablation).
        information: weight of the mutual information between spatial and channel tokens (Eq. 7 to 9), by
            which its network climbs and the student descends. The paper does not print it; 0 leaves the
            network out.
    """

    positions: tuple[int | str, ...] = (-1,)
    blocks: int = 1
    tokens: str = "both"
    information: float = 0.0

    paper: ClassVar[str] = "STD, Li et al., 2022"
    fits: ClassVar[str] = "blocks with at least two patch tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.positions, (tuple, list)):
            raise RecipeError(f"positions is a list with one block for each teacher, got {self.positions!r}")
        object.__setattr__(self, "positions", tuple(self.positions))
        not_negative(self, "information")
        self.config(len(self.positions))

    def config(self, teachers: int) -> StdConfig:
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
        return StdConfig(
            positions=positions, blocks=self.blocks, tokens=self.tokens, information=self.information > 0
        )

    def check_run(self, teachers: int, epochs: int | None) -> None:
        super().check_run(teachers, epochs)
        self.config(teachers)

    def check_student(self, module: TracedModule, known: Anatomy) -> None:
        blocks_with_tokens(known, self.config(len(self.positions)))

    def injections(self, student: Source, teachers: Sequence[Source]) -> list[Injected]:
        return [Injected(NAME, self.config(len(teachers)))]

    def heads(self, batch: Batch) -> list[Tensor]:
        return [batch.outputs[f"{NAME}/{index}"] for index in range(len(batch.teachers))]

    def terms(self, batch: Batch) -> list[Term]:
        terms = super().terms(batch)
        if self.information:
            terms.append(Term(f"{self.name}/information", batch.outputs[INFORMATION], self.information))
        return terms
