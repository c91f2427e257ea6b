"""CiT's loss: labels for the class token, a convolutional teacher for the conv token, an involutional one for
the involution token (CiT Eq. 1).

    L = λ0 CE(Z_cls, y) + λ1 τ1² KL(Z_conv, Z_t1; τ1) + λ2 τ2² KL(Z_inv, Z_t2; τ2)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from vmkd_fx.distill.losses.kd import SoftDistillation
from vmkd_fx.errors import RecipeError
from vmkd_fx.passes.heads.full_precision import in_full_precision


class CiTParts(NamedTuple):
    """Scalars, λ and τ² included; the loss is their sum."""

    class_loss: torch.Tensor
    conv: torch.Tensor
    inv: torch.Tensor


class CiTLoss(nn.Module):
    """The three terms of Eq. 1 as means over the batch; the KL divergences are summed over the classes.

    Args:
        temperatures: τ1, τ2, of the conv and the involution token; the authors' code has 1.
        weights: λ0, λ1, λ2; the authors' code has 1 each.
        criterion: the loss to the labels, cross-entropy by default, which takes soft labels (B, C) too.
    """

    def __init__(
        self,
        temperatures: tuple[float, float] = (1.0, 1.0),
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        criterion: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if len(temperatures) != 2 or len(weights) != 3 or min(weights) < 0:
            raise RecipeError(
                "CiT has two temperatures and three weights, none below 0 (class, conv, involution), "
                f"got {temperatures} and {weights}"
            )
        self.conv, self.inv = (SoftDistillation(temperature) for temperature in temperatures)
        self.weights = tuple(weights)
        self.criterion = criterion or nn.CrossEntropyLoss()

    @in_full_precision
    def forward(
        self,
        logits: torch.Tensor,
        conv: torch.Tensor,
        inv: torch.Tensor,
        conv_teacher: torch.Tensor,
        inv_teacher: torch.Tensor,
        labels: torch.Tensor,
    ) -> CiTParts:
        """Three heads and two teachers (B, C), labels (B,) or (B, C)."""
        by_class, by_conv, by_inv = self.weights
        return CiTParts(
            by_class * self.criterion(logits, labels),
            by_conv * self.conv(conv, conv_teacher).mean(),
            by_inv * self.inv(inv, inv_teacher).mean(),
        )
