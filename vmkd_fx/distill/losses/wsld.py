"""Weighted soft labels distillation (Zhou et al., 2021, "Rethinking Soft Labels for Knowledge Distillation"):
KD whose weight falls for samples that the student knows better than the teacher.

    L = α T² (1 - exp(-CE(student) / CE(teacher))) · -Σ p log q

with the cross-entropies to the labels at temperature 1, p and q at temperature T. The weight has no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vmkd_fx.distill.losses.kd import SoftDistillation
from vmkd_fx.distill.losses.logits import check_logits, pick, target_classes
from vmkd_fx.passes.heads.full_precision import in_full_precision

EPSILON = 1e-7
"""Added to the teacher's cross-entropy: a teacher beyond doubt has 0."""


class WSLD(nn.Module):
    """WSLD's loss: (B, C), (B, C), labels to (B,), per sample, mean it yourself.

    Of soft labels (B, C) the largest alone is taken as the label. The cross-entropy with the labels is not
    part of it.

    Args:
        temperature: T.
        alpha: the weight.
    """

    def __init__(self, temperature: float = 2.0, alpha: float = 2.5) -> None:
        super().__init__()
        self.soft = SoftDistillation(temperature, keep_entropy=True)
        self.alpha = alpha

    @in_full_precision
    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_logits(student, teacher)
        target = target_classes(labels, student, "WSLD")
        student_loss, teacher_loss = (
            -pick(F.log_softmax(logits.detach(), dim=-1), target) for logits in (student, teacher)
        )
        weight = 1 - torch.exp(-student_loss / (teacher_loss + EPSILON))
        return self.alpha * weight * self.soft(student, teacher)
