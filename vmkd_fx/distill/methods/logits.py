"""Methods that read nothing but the teachers' logits, and leave the student's graph as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vmkd_fx.distill.losses import (
    CONFIDENCES,
    DKD,
    NKD,
    HardDistillation,
    SoftDistillation,
    TeacherLoss,
)
from vmkd_fx.distill.methods.base import Batch, Method, Term
from vmkd_fx.distill.methods.settings import choice, not_negative, positive, share, whole
from vmkd_fx.graph.edit import LOGITS

DISTILLATIONS = ("hard", "soft")


def weighted(
    heads: Sequence[Tensor],
    batch: Batch,
    confidence: str,
    loss: nn.Module,
) -> list[Tensor]:
    """The batch mean of the loss of each head to its teacher, each sample weighted by the teachers'
    confidence (STD Eq. 11).
    """
    teachers = torch.stack([outputs[LOGITS] for outputs in batch.teachers])
    return list(TeacherLoss(loss, confidence)(torch.stack(list(heads)), teachers, batch.target))


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

    def heads(self, batch: Batch) -> list[Tensor]:
        """The logits (B, C) that learn from each teacher."""
        return [batch.outputs[LOGITS]] * len(batch.teachers)

    def terms(self, batch: Batch) -> list[Term]:
        hard = self.distillation == "hard"
        loss = HardDistillation() if hard else SoftDistillation(self.temperature)
        values = weighted(self.heads(batch), batch, self.confidence, loss)
        return [Term(f"{self.name}/{index}", value, self.alpha) for index, value in enumerate(values)]


@dataclass(frozen=True)
class Nkd(Method):
    """L = L_class + weight L_nkd: the teacher's target class and the rest, each normalised (Yang et al.,
    2023).

    Attributes:
        gamma: γ, weight of the classes but the target; the authors' recipe for DeiT has 1, their class 1.5.
        temperature: of the classes but the target.
        weight: of both.
        confidence: how several teachers are weighted.
    """

    gamma: float = 1.5
    temperature: float = 1.0
    weight: float = 1.0
    confidence: str = "negative_entropy"

    paper: ClassVar[str] = "NKD, Yang et al., 2023"

    def __post_init__(self) -> None:
        choice("confidence", self.confidence, CONFIDENCES)
        positive(self, "temperature", "weight")
        not_negative(self, "gamma")

    def terms(self, batch: Batch) -> list[Term]:
        loss = NKD(self.gamma, self.temperature)
        return labelled(self.name, loss, self.weight, self.confidence, batch)


@dataclass(frozen=True)
class Dkd(Method):
    """L = L_class + weight L_dkd: the target's share and the rest, weighted apart (Zhao et al., 2022, Eq. 7).

    Attributes:
        alpha, beta: weights of the target's share and of the rest.
        temperature: of both.
        weight: of both together.
        warmup_epochs: over which the weight grows from one part of it to the whole; 0: whole from the start.
            The authors' code has 20 for CIFAR-100, with the other defaults here, and none for ImageNet.
        confidence: how several teachers are weighted.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    weight: float = 1.0
    warmup_epochs: int = 0
    confidence: str = "negative_entropy"

    paper: ClassVar[str] = "DKD, Zhao et al., 2022"

    def __post_init__(self) -> None:
        choice("confidence", self.confidence, CONFIDENCES)
        positive(self, "temperature", "weight")
        not_negative(self, "alpha", "beta")
        whole(self, "warmup_epochs")

    @property
    def needs_epoch(self) -> bool:
        return self.warmup_epochs > 0

    def terms(self, batch: Batch) -> list[Term]:
        loss = DKD(self.alpha, self.beta, self.temperature)
        weight = self.weight
        if self.warmup_epochs and batch.epoch is not None:
            weight *= min((batch.epoch + 1) / self.warmup_epochs, 1.0)
        return labelled(self.name, loss, weight, self.confidence, batch)


def labelled(name: str, loss: nn.Module, weight: float, confidence: str, batch: Batch) -> list[Term]:
    """The terms of a loss of the class head that looks at the labels as well."""
    heads = [batch.outputs[LOGITS]] * len(batch.teachers)
    values = weighted(heads, batch, confidence, loss)
    return [Term(f"{name}/{index}", value, weight) for index, value in enumerate(values)]
