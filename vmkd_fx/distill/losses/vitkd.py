"""ViTKD: mimic the teacher's shallow features, generate its deep one (ViTKD Eq. 1, 5, 6 and 7).

    L_lr = Σ_layers Σ_ij (F^T - fc(F^S))²_ij          L_gen = Σ_i Mask_i Σ_j (F^T - G(F̂^S))²_ij

fc and G learn and are `vmkd_fx.passes.heads.ViTKDMimic` and `ViTKDGenerator`. The authors' code averages
both over the batch and divides L_gen by the mask ratio λ; so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from vmkd_fx.distill.losses.features import check_features, squared_distance
from vmkd_fx.distill.losses.relation import MAX_BYTES, check_relation
from vmkd_fx.errors import ModelError, RecipeError, UnknownNameError
from vmkd_fx.passes.heads.full_precision import in_full_precision

MIMICKING = ("linear", "correlation")


class ViTKDParts(NamedTuple):
    """Scalars: α L_lr and β L_gen / λ; the loss is their sum."""

    mimicking: torch.Tensor
    generation: torch.Tensor


def correlation_matrix(tokens: torch.Tensor) -> torch.Tensor:
    """M = F F^T / sqrt(D), how tokens answer one another: (B, N, D) to (B, N, N) (Eq. 7)."""
    return tokens @ tokens.transpose(1, 2) / tokens.shape[-1] ** 0.5


class ViTKDLoss(nn.Module):
    """Both terms of ViTKD as means over the batch.

    Args:
        alpha, beta: weights of mimicking and generation.
        ratio: λ, that of the generator.
        mimicking: "linear", the features of `ViTKDMimic`; "correlation", the correlation matrices of student
            and teacher, whose widths may differ (table 8).
        max_bytes: what a student's and a teacher's correlation matrices of one layer may take together.

    Raises:
        RecipeError: λ is not between 0 and 1.
    """

    def __init__(
        self,
        alpha: float = 3e-5,
        beta: float = 3e-6,
        ratio: float = 0.5,
        mimicking: str = "linear",
        max_bytes: int = MAX_BYTES,
    ) -> None:
        super().__init__()
        if mimicking not in MIMICKING:
            raise UnknownNameError("mimicking", mimicking, MIMICKING)
        if not 0 < ratio < 1:
            raise RecipeError(f"the mask ratio must be between 0 and 1, got {ratio!r}; the paper's is 0.5")
        self.alpha, self.beta, self.ratio = alpha, beta, ratio
        self.mimicking, self.max_bytes = mimicking, max_bytes

    @in_full_precision
    def forward(
        self,
        shallow: Sequence[torch.Tensor],
        teacher_shallow: Sequence[torch.Tensor],
        generated: torch.Tensor,
        mask: torch.Tensor,
        teacher_deep: torch.Tensor,
    ) -> ViTKDParts:
        """The losses of patch tokens, without class, distillation and register tokens.

        Args:
            shallow, teacher_shallow: of the chosen layers, (B, N, D_teacher) each; for "correlation" the
                student's may be (B, N, D_student). The paper takes the first two blocks.
            generated, teacher_deep: (B, N, D_teacher), the teacher's behind its final norm.
            mask: (B, N), 1 where the student's token was masked.
        """
        if len(shallow) != len(teacher_shallow) or not len(shallow):
            raise ModelError(
                f"{len(shallow)} shallow features of the student and {len(teacher_shallow)} of the teacher; "
                "mimicking needs as many of each, at least one"
            )
        layers = [self._mimicked(s, t) for s, t in zip(shallow, teacher_shallow, strict=True)]
        check_features(generated, teacher_deep)
        if mask.shape != generated.shape[:2]:
            raise ModelError(f"the mask is {tuple(mask.shape)} for tokens {tuple(generated.shape[:2])}")
        apart = (generated - teacher_deep).square().sum(-1)
        generation = (apart * mask).sum(1).mean()
        return ViTKDParts(self.alpha * torch.stack(layers).sum(), self.beta / self.ratio * generation)

    def _mimicked(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if self.mimicking == "correlation":
            check_relation(student, teacher, self.max_bytes)
            student, teacher = correlation_matrix(student), correlation_matrix(teacher)
        return squared_distance(student, teacher).mean()
