"""Methods that read nothing but the teachers' logits, and leave the student's graph as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vmkd_fx.distill.losses import (
    CONFIDENCES,
    HardDistillation,
    SoftDistillation,
    confidence_weights,
)
from vmkd_fx.distill.methods.base import Batch, Method, Term
from vmkd_fx.distill.methods.settings import choice, positive, share
from vmkd_fx.graph.edit import LOGITS

DISTILLATIONS = ("hard", "soft")


def distillation_loss(kind: str, temperature: float) -> nn.Module:
    """The loss of one head to one teacher, (B, C), (B, C) to (B,)."""
    return HardDistillation() if kind == "hard" else SoftDistillation(temperature)


def weighted(
    heads: Sequence[Tensor],
    batch: Batch,
    confidence: str,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """The batch mean of the loss of each head to its teacher, each sample weighted by the teachers'
    confidence (STD Eq. 11).
    """
    teachers = torch.stack([outputs[LOGITS] for outputs in batch.teachers])
    weights = confidence_weights(teachers, confidence)
    return [
        (weight * loss(head, teacher)).mean()
        for weight, head, teacher in zip(weights, heads, teachers, strict=True)
    ]


@dataclass(frozen=True)
class Distillation(Method):
    """The class head learns from the labels and the teachers alike: L = (1 - alpha) L_class + alpha L_dist.

    Attributes:
        distillation: "hard", the teacher's decision as a label (Touvron et al., 2021), or "soft", the KL
            divergence at `temperature` (Hinton et al., 2015).
        temperature: of the soft distillation.
        alpha: share of the distillation loss; 0.5 is DeiT's, 1 leaves the labels out.
        confidence: how several teachers are weighted, see `confidence_weights`.
    """

    distillation: str = "hard"
    temperature: float = 1.0
    alpha: float = 0.5
    confidence: str = "negative_entropy"

    paper: ClassVar[str] = "Hinton et al., 2015; Touvron et al., 2021"

    def __post_init__(self) -> None:
        choice("distillation", self.distillation, DISTILLATIONS)
        choice("confidence", self.confidence, CONFIDENCES)
        positive(self, "temperature")
        share(self, "alpha")

    @property
    def class_share(self) -> float:
        return 1 - self.alpha

    def terms(self, batch: Batch) -> list[Term]:
        loss = distillation_loss(self.distillation, self.temperature)
        heads = [batch.outputs[LOGITS]] * len(batch.teachers)
        values = weighted(heads, batch, self.confidence, loss)
        return [Term(f"{self.name}/{index}", value, self.alpha) for index, value in enumerate(values)]
