"""FitNet's hint loss (Romero et al., 2015, Eq. 3): a student's feature, projected, against the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vmkd_fx.distill.losses.features import check_features, squared_distance
from vmkd_fx.errors import UnknownNameError
from vmkd_fx.passes.heads.full_precision import in_full_precision

REDUCTIONS = ("elements", "sample")


class FitNetLoss(nn.Module):
    """The distance between the student's projected feature and the teacher's, of any one shape, a scalar.

    The projection is `vmkd_fx.passes.heads.FitNetProjection`.

    Args:
        reduction: "elements", the mean of the squared difference over all elements, which does not depend on
            the feature's size; "sample", half the squared norm as Eq. 3 prints it, summed over a sample's
            elements and averaged over the batch.
    """

    def __init__(self, reduction: str = "elements") -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise UnknownNameError("reduction", reduction, REDUCTIONS)
        self.reduction = reduction

    @in_full_precision
    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        check_features(student, teacher)
        if self.reduction == "elements":
            return F.mse_loss(student, teacher)
        return squared_distance(student, teacher).mean() / 2
