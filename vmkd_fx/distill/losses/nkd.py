"""Normalised knowledge distillation (Yang et al., 2023, "From Knowledge Distillation to Self-Knowledge
Distillation"): the loss to the teacher's target class and to the rest, each a distribution of its own.

With target t, p and q the teacher's and the student's softmax, and p̂, q̂ their softmax at temperature T
over the classes but t:

    L = -p_t log q_t - γ T² Σ_{i≠t} p̂_i log q̂_i

Only the second term is tempered. It is a cross-entropy, so it does not vanish where student and teacher
agree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vmkd_fx.distill.losses.logits import (
    check_logits,
    check_positive,
    is_target,
    log_softmax_without,
    pick,
    softmax_without,
    target_classes,
)
from vmkd_fx.passes.heads.full_precision import in_full_precision


class NKDParts(NamedTuple):
    """Each (B,); the loss is their sum, γ and T² included."""

    target: torch.Tensor
    non_target: torch.Tensor


@in_full_precision
def nkd_parts(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> NKDParts:
    """Both terms for each sample: (B, C), (B, C) and labels (B,) or (B, C) to (B,) and (B,)."""
    check_logits(student, teacher)
    target = target_classes(labels, student, "NKD")
    left_out = is_target(target, student)
    p_target = pick(F.softmax(teacher, dim=-1), target)
    log_q_target = pick(F.log_softmax(student, dim=-1), target)
    p_rest = softmax_without(teacher / temperature, left_out)
    log_q_rest = log_softmax_without(student / temperature, left_out)
    rest = -(p_rest * log_q_rest).sum(-1)
    return NKDParts(-p_target * log_q_target, gamma * temperature**2 * rest)


class NKD(nn.Module):
    """NKD's loss: (B, C), (B, C), labels to (B,), per sample, mean it yourself. `nkd_parts` gives its terms.

    Labels are classes (B,) or soft labels (B, C), as mixup makes them; of those the largest alone is taken
    as the target, and the shares are not looked at. The cross-entropy with the labels is not part of it.

    Args:
        gamma: γ, 1.5 by default; the authors' recipe for DeiT has 1.
        temperature: T of the classes but the target.
    """

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.gamma, self.temperature = gamma, temperature

    @in_full_precision
    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        target = target_classes(labels, student, "NKD")
        parts = nkd_parts(student, teacher, target, self.gamma, self.temperature)
        return parts.target + parts.non_target
