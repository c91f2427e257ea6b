"""What the feature losses share."""

from __future__ import annotations

import torch

from vmkd_fx.errors import ModelError


def check_features(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Raises:
    ModelError: the two differ in shape; nothing is broadcast or cut.
    """
    if student.shape != teacher.shape:
        raise ModelError(
            f"the student's feature is {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; "
            "a projection brings the student to the teacher's width, "
            "vmkd_fx.passes.heads.resize_tokens the teacher to the student's grid"
        )


def squared_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Σ (student - teacher)² of each sample: (B, ...) to (B,)."""
    check_features(student, teacher)
    return (student - teacher).square().flatten(1).sum(1)
