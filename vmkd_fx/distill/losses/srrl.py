"""Softmax regression representation learning (Yang et al., 2021): the student's feature, brought to the
teacher's width, should give the teacher's logits when the teacher's own classifier reads it.

    L = α mean (h_S - h_T)² + β mean (W_T h_S - W_T h_T)²

with h the features averaged over their locations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vmkd_fx.distill.losses.features import check_features
from vmkd_fx.distill.losses.logits import check_logits
from vmkd_fx.passes.heads.full_precision import in_full_precision


class SRRLParts(NamedTuple):
    """Scalars, α and β included; the loss is their sum."""

    feature: torch.Tensor
    regression: torch.Tensor


class SRRLLoss(nn.Module):
    """SRRL's two terms, each a mean over all elements of the batch.

    The student's feature comes through a projection (`vmkd_fx.passes.heads.FitNetProjection`; the paper's
    connector), and its logits through the teacher's frozen classifier.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.0) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta

    @in_full_precision
    def forward(
        self,
        feature: torch.Tensor,
        teacher_feature: torch.Tensor,
        regressed: torch.Tensor,
        teacher_logits: torch.Tensor,
    ) -> SRRLParts:
        """Features (B, D, H, W), tokens (B, N, D) or vectors (B, D), of the teacher's width D; the teacher's
        classifier on the student's feature, and the teacher's logits, (B, C).
        """
        student, teacher = pooled(feature), pooled(teacher_feature)
        check_features(student, teacher)
        check_logits(regressed, teacher_logits)
        return SRRLParts(
            self.alpha * F.mse_loss(student, teacher), self.beta * F.mse_loss(regressed, teacher_logits)
        )


def pooled(feature: torch.Tensor) -> torch.Tensor:
    """Mean over the locations: (B, D, H, W), (B, N, D) or (B, D) to (B, D)."""
    if feature.ndim == 4:
        return feature.mean((2, 3))
    return feature.mean(1) if feature.ndim == 3 else feature
