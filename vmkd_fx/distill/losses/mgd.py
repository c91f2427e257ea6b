"""Masked generative distillation (Yang et al., 2022): the teacher's feature from a masked student's."""

from __future__ import annotations

import torch
from torch import nn

from vmkd_fx.distill.losses.features import squared_distance
from vmkd_fx.passes.heads.full_precision import in_full_precision


class MGDLoss(nn.Module):
    """α Σ (generated - teacher)², summed over a sample's elements and averaged over the batch: a scalar.

    All locations and channels count, masked or not. The generator is `vmkd_fx.passes.heads.MGDGenerator`.

    Args:
        alpha: 7e-5 for classification.
    """

    def __init__(self, alpha: float = 7e-5) -> None:
        super().__init__()
        self.alpha = alpha

    @in_full_precision
    def forward(self, generated: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Both (B, C_teacher, H, W)."""
        return self.alpha * squared_distance(generated, teacher).mean()
