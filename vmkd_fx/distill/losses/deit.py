"""DeiT's loss for a class head and a distillation head (Touvron et al., 2021, Eq. 2 and 3)."""

from __future__ import annotations

import torch
from torch import nn

from vmkd_fx.distill.losses.kd import HardDistillation, SoftDistillation
from vmkd_fx.distill.losses.teachers import class_and_distillation
from vmkd_fx.errors import RecipeError, UnknownNameError
from vmkd_fx.passes.heads.full_precision import in_full_precision

KINDS = ("none", "soft", "hard")
VARIANTS = ("paper", "code")


class DeiTLoss(nn.Module):
    """L = (1 - α) criterion(class head, labels) + α L_dist(distillation head, teacher), a batch mean.

    Args:
        kind: "hard", cross-entropy with the teacher's decision (Eq. 3); "soft", T² KL(teacher || student)
            (Eq. 2); "none", the criterion alone, without α.
        alpha: share of the distillation; 0.5 for the hard one, the paper's 0.1 for the soft one.
        temperature: T of the soft one, 3 in the paper.
        criterion: the loss to the labels, cross-entropy by default, which takes soft labels (B, C) too.
        variant: "code" divides the soft loss by the number of classes as well, as DeiT's code does: it is C
            times smaller than the paper's.
    """

    def __init__(
        self,
        kind: str = "hard",
        alpha: float = 0.5,
        temperature: float = 3.0,
        criterion: nn.Module | None = None,
        variant: str = "paper",
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise UnknownNameError("distillation", kind, KINDS)
        if variant not in VARIANTS:
            raise UnknownNameError("variant", variant, VARIANTS)
        if not 0 <= alpha <= 1:
            raise RecipeError(f"alpha is the share of the distillation loss, from 0 to 1, got {alpha!r}")
        self.kind, self.alpha, self.variant = kind, alpha, variant
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.distillation = HardDistillation() if kind == "hard" else SoftDistillation(temperature)

    @in_full_precision
    def forward(
        self, logits: torch.Tensor, dist_logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Class head, distillation head and teacher (B, C), labels (B,) or (B, C), to a scalar."""
        class_loss = self.criterion(logits, labels)
        if self.kind == "none":
            return class_loss
        dist_loss = self.distillation(dist_logits, teacher).mean()
        if self.kind == "soft" and self.variant == "code":
            dist_loss = dist_loss / logits.shape[-1]
        return class_and_distillation(class_loss, dist_loss, self.alpha)
