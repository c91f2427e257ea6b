"""DeiT: a distillation token with a head of its own (Touvron et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vmkd_fx.distill.methods.base import Batch, Source
from vmkd_fx.distill.methods.logits import Distillation
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.injections import Injected
from vmkd_fx.passes.two_heads import NAME, TwoHeadsConfig, two_heads


@dataclass(frozen=True)
class DeiT(Distillation):
    """L = (1 - alpha) L_class(class head) + alpha L_dist(distillation head) (Eq. 2 and 3)."""

    paper: ClassVar[str] = "DeiT, Touvron et al., 2021"
    fits: ClassVar[str] = "students with a distillation head: deit*_distilled*, levit*"

    @property
    def class_output(self) -> str:
        return f"{NAME}/class"

    def injections(self, student: Source, teachers: Sequence[Source]) -> list[Injected]:
        return [Injected(NAME, TwoHeadsConfig())]

    def check_student(self, module: TracedModule, known: Anatomy) -> None:
        two_heads(module)

    def heads(self, batch: Batch) -> list[Tensor]:
        return [batch.outputs[f"{NAME}/dist"]] * len(batch.teachers)
