"""CiT: a convolution and an involution token, and a teacher with that bias for each (Ren et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vmkd_fx.distill.losses import SoftDistillation
from vmkd_fx.distill.methods.base import Batch, Method, Source, Term
from vmkd_fx.distill.methods.settings import choice, is_number, share
from vmkd_fx.errors import RecipeError
from vmkd_fx.graph.edit import LOGITS
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.bias_heads import HEADS, BiasHeadConfig, inject_bias_heads
from vmkd_fx.passes.bias_tokens import NAME, TOKENS, BiasTokenConfig
from vmkd_fx.passes.injections import Injected


@dataclass(frozen=True)
class CiT(Method):
    """L = λ0 L_class + λ1 τ1² KL(conv head, conv teacher) + λ2 τ2² KL(inv head, inv teacher) (Eq. 1).

    The first teacher is the convolutional one, the second the involutional one (`rednet50`, say).

    Attributes:
        tokens: "random", learnt (CiT-Ti, CiT-S), or "aligned", made by stems that make the patches too
            (CiT-SAK). A student without a class token (Mixer, ResNet) gets the heads alone.
        labels: λ0.
        weights: λ1 and λ2; the authors' code has 1.
        temperatures: τ1 and τ2; the authors' code has 1.
    """

    tokens: str = "random"
    labels: float = 1.0
    weights: tuple[float, float] = (1.0, 1.0)
    temperatures: tuple[float, float] = (1.0, 1.0)

    paper: ClassVar[str] = "CiT, Ren et al., 2022"
    fits: ClassVar[str] = "blocks that all see a class token; others get heads on the pooled feature"

    def __post_init__(self) -> None:
        choice("tokens", self.tokens, ("random", "aligned"))
        share(self, "labels")
        for name in ("weights", "temperatures"):
            values = getattr(self, name)
            pair = isinstance(values, (tuple, list)) and len(values) == 2 and all(map(is_number, values))
            if not pair or min(values) < 0 or (name == "temperatures" and min(values) == 0):
                raise RecipeError(
                    f"{self.name}: {name} are two numbers, for the convolutional and the involutional "
                    f"teacher, got {values!r}"
                )
            object.__setattr__(self, name, tuple(values))

    @property
    def class_share(self) -> float:
        return self.labels

    def check_run(self, teachers: int, epochs: int | None) -> None:
        if teachers != 2:
            raise RecipeError(
                f"{self.name} has two teachers, a convolutional and an involutional one, and got {teachers}: "
                f"wrap(student, {self.name!r}, teachers=[resnet, rednet])"
            )

    def changes(self, known: Anatomy) -> list[Injected]:
        has_class_token = bool(known.blocks) and known.blocks[-1].prefix_tokens > 0
        return [Injected(NAME, BiasTokenConfig(self.tokens))] if has_class_token else []

    def check_student(self, module: TracedModule, known: Anatomy) -> None:
        if not self.changes(known):
            inject_bias_heads(module, BiasHeadConfig(), known)

    def injections(self, student: Source, teachers: Sequence[Source]) -> list[Injected]:
        return [Injected(HEADS, BiasHeadConfig())]

    def terms(self, batch: Batch) -> list[Term]:
        settings = zip(TOKENS, self.temperatures, self.weights, batch.teachers, strict=True)
        return [
            Term(
                f"{self.name}/{token}",
                SoftDistillation(temperature)(batch.outputs[f"{HEADS}/{token}"], teacher[LOGITS]).mean(),
                weight,
            )
            for token, temperature, weight, teacher in settings
        ]
