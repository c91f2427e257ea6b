"""ViTKD: mimic the teacher's shallow features, generate its last one (Yang et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vmkd_fx.distill.losses import ViTKDLoss
from vmkd_fx.distill.losses.vitkd import MIMICKING
from vmkd_fx.distill.methods.base import Batch, FeatureMethod, Source, Term, on_the_grid_of
from vmkd_fx.distill.methods.pairs import Wanted, grid_of
from vmkd_fx.distill.methods.settings import choice, not_negative
from vmkd_fx.errors import RecipeError
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.heads.masking import kept_tokens
from vmkd_fx.passes.heads.vitkd import GENERATORS
from vmkd_fx.passes.injections import Injected
from vmkd_fx.passes.vitkd import FEATURES, NAME, VitKdConfig, feature_of


@dataclass(frozen=True)
class ViTKD(FeatureMethod):
    """L = L_class + alpha L_lr + beta L_gen / ratio (Eq. 6; the division is the authors' code's).

    Attributes:
        alpha, beta: weights of mimicking and generation.
        ratio: λ, the share of the last feature's tokens that are masked.
        shallow: indices of the blocks that mimic, the same in student and teacher whatever their depths.
        mimicking: "linear", aligned features, or "correlation", matrices of how tokens answer one another.
        generator: "conv", "self_attention" or "cross_attention" (table 7).
        features: "ffn", what a shallow block leaves, or "mha", its sum behind the attention (table 9).
    """

    alpha: float = 3e-5
    beta: float = 3e-6
    ratio: float = 0.5
    shallow: tuple[int, ...] = (0, 1)
    mimicking: str = "linear"
    generator: str = "conv"
    features: str = "ffn"

    paper: ClassVar[str] = "ViTKD, Yang et al., 2022"
    fits: ClassVar[str] = "transformers, and other blocks whose patches stand in a grid"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shallow", tuple(self.shallow))
        choice("mimicking", self.mimicking, MIMICKING)
        choice("generator", self.generator, GENERATORS)
        choice("features", self.features, FEATURES)
        not_negative(self, "alpha", "beta")
        if not self.shallow:
            raise RecipeError(f"{self.name}: shallow names no block; the paper takes (0, 1)")
        ViTKDLoss(self.alpha, self.beta, self.ratio, self.mimicking)

    def check_student(self, module: TracedModule, known: Anatomy) -> None:
        for index in self.shallow:
            block = known.blocks[known.position(index)]
            feature_of(block, self.features)
            grid_of(block.tokens, module.info.need_input_size(), block.path)
        last = known.blocks[known.position(-1)]
        grid_of(last.tokens, module.info.need_input_size(), last.path)
        kept_tokens(last.tokens, self.ratio)

    def wanted(self, student: Source, teacher: Source) -> dict[str, Wanted]:
        ours, theirs = student.anatomy, teacher.anatomy
        found = {}
        for place, index in enumerate(self.shallow):
            mine, other = (known.blocks[known.position(index)] for known in (ours, theirs))
            node = feature_of(other, self.features)
            found[f"{NAME}/shallow_{place}"] = on_the_grid_of(mine, student, node, other, teacher)
        mine, other = ours.blocks[-1], theirs.blocks[-1]
        return {**found, f"{NAME}/deep": on_the_grid_of(mine, student, theirs.final, other, teacher)}

    def injections(self, student: Source, teachers: Sequence[Source]) -> list[Injected]:
        known, teacher = student.anatomy, teachers[self.teacher].anatomy
        dims = tuple(teacher.blocks[teacher.position(index)].channels for index in self.shallow)
        last = known.blocks[-1]
        config = VitKdConfig(
            self.shallow,
            dims if self.mimicking == "linear" else (0,) * len(dims),
            teacher.blocks[-1].channels,
            grid_of(last.tokens, student.input_size, last.path),
            self.ratio,
            self.generator,
            self.features,
        )
        return [Injected(NAME, config)]

    def terms(self, batch: Batch) -> list[Term]:
        theirs = batch.teachers[self.teacher]
        names = [f"{NAME}/shallow_{place}" for place in range(len(self.shallow))]
        parts = ViTKDLoss(self.alpha, self.beta, self.ratio, self.mimicking)(
            [batch.outputs[name] for name in names],
            [theirs[name] for name in names],
            batch.outputs[f"{NAME}/generated"],
            batch.outputs[f"{NAME}/mask"],
            theirs[f"{NAME}/deep"],
        )
        return [
            Term(f"{self.name}/mimicking", parts.mimicking),
            Term(f"{self.name}/generation", parts.generation),
        ]
