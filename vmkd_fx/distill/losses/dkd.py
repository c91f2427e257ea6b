"""Decoupled knowledge distillation (Zhao et al., 2022, Eq. 7): the target's share and the rest, apart.

    L = α T² KL([p_t, 1 - p_t] || [q_t, 1 - q_t]) + β T² KL(p̂ || q̂)

with target t, p and q the softmax at temperature T, and p̂, q̂ that over the classes but t. Coupled as in
plain KD the second term would be weighted by 1 - p_t, the less the surer the teacher.
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
    target_classes,
)
from vmkd_fx.passes.heads.full_precision import in_full_precision


class DKDParts(NamedTuple):
    """Each (B,), α, β and T² included; the loss is their sum."""

    target: torch.Tensor
    non_target: torch.Tensor


@in_full_precision
def dkd_parts(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> DKDParts:
    """Both terms for each sample: (B, C), (B, C) and labels (B,) or (B, C) to (B,) and (B,)."""
    check_logits(student, teacher)
    left_out = is_target(target_classes(labels, student, "DKD"), student)
    student, teacher = student / temperature, teacher / temperature
    target = _divergence(_target_and_rest(student, left_out), _target_and_rest(teacher, left_out))
    rest = _divergence(log_softmax_without(student, left_out), log_softmax_without(teacher, left_out))
    return DKDParts(alpha * temperature**2 * target, beta * temperature**2 * rest)


class DKD(nn.Module):
    """DKD's loss: (B, C), (B, C), labels to (B,), per sample, mean it yourself. `dkd_parts` gives its terms.

    Of soft labels (B, C) the largest alone is taken as the target.

    Args:
        alpha, beta: weights of the target's share and of the rest.
        temperature: T of both.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    @in_full_precision
    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        target = target_classes(labels, student, "DKD")
        parts = dkd_parts(student, teacher, target, self.alpha, self.beta, self.temperature)
        return parts.target + parts.non_target


def _target_and_rest(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """log [p_t, 1 - p_t], (B, 2): the rest is a sum of its own: 1 - p_t cancels for a sure teacher."""
    log_p = F.log_softmax(logits, dim=-1)
    at_target = log_p.masked_fill(~target, -torch.inf).logsumexp(-1)
    rest = log_p.masked_fill(target, -torch.inf).logsumexp(-1)
    return torch.stack([at_target, rest], dim=-1)


def _divergence(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the last axis; classes that both leave out stand as 0 and count nothing."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
