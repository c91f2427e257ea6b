"""Universal self-knowledge distillation (Yang et al., 2023): soft labels without a teacher.

Three terms, with q the student's softmax and w that of a weak classifier on an earlier feature:

- target: α Σ -P_t log q_t over the label (the two largest of a soft label), P_t = q_t² + y_t - mean q_t², the
  student's own certainty, smoothed around the label;
- non-target: β Σ -z_i log q̂_i over the other classes, z a Zipf distribution (1, 1/2, 1/3, ...) by the
  classes' rank in weak and final classifier together;
- weak: μ times the cross-entropy of w with the label, smoothed by 0.1.

P_t and z have no gradient. Classes are ranked as the authors' code does, by w_i / (1 - w_t) plus log q_i over
(1 - log q_t), the student's part thus by log-probabilities.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vmkd_fx.distill.losses.logits import check_logits, is_target, log_softmax_without, target_classes
from vmkd_fx.errors import ModelError
from vmkd_fx.passes.heads.full_precision import in_full_precision
from vmkd_fx.passes.heads.joined import of_all, processes

EPSILON = 1e-6
SMOOTHING = 0.1


class USKDParts(NamedTuple):
    """Scalars, α, β and μ included; the loss is their sum."""

    target: torch.Tensor
    non_target: torch.Tensor
    weak: torch.Tensor


class USKDLoss(nn.Module):
    """USKD's terms as means over the batch (the target term looks at the whole batch, so there is no loss of
    one sample).

    The weak logits come from `vmkd_fx.passes.heads.WeakClassifier`. The cross-entropy with the labels is not
    part of it.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005) -> None:
        super().__init__()
        self.alpha, self.beta, self.mu = alpha, beta, mu

    @in_full_precision
    def forward(self, student: torch.Tensor, weak: torch.Tensor, labels: torch.Tensor) -> USKDParts:
        """Logits and weak logits (B, C), labels (B,) or soft labels (B, C)."""
        check_logits(student, weak)
        shares, target = _targets(labels, student)
        if student.shape[-1] <= target.shape[-1]:
            raise ModelError(
                f"USKD ranks the classes beside the label's {target.shape[-1]}, the logits have "
                f"{student.shape[-1]}; soft labels need 3 classes"
            )
        log_q = F.log_softmax(student, dim=-1)
        left_out = is_target(target, student)
        zipf = _zipf(log_q.detach(), weak.detach(), target).masked_fill(left_out, 0)
        zipf = zipf / zipf.sum(-1, keepdim=True)
        return USKDParts(
            self.alpha * _target_term(log_q, shares, target),
            self.beta * -(zipf * log_softmax_without(student, left_out)).sum(-1).mean(),
            self.mu * _smoothed_cross_entropy(weak, labels),
        )


def _targets(labels: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares and classes, (B, 1) of labels and (B, 2), the two largest, of soft labels."""
    largest = target_classes(labels, logits, "USKD")
    if labels.ndim == 1:
        return torch.ones_like(labels, dtype=logits.dtype)[:, None], largest[:, None]
    shares, target = labels.to(logits.dtype).topk(2, dim=-1)
    return shares, target


def _target_term(log_q: torch.Tensor, shares: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    log_q = log_q.gather(-1, target)
    certainty = log_q.detach().exp().square()
    smoothed = (certainty + shares - _mean_of_all(certainty)).masked_fill(shares == 0, 0)
    return -(smoothed * log_q).sum(-1).mean()


def _mean_of_all(certainty: torch.Tensor) -> torch.Tensor:
    """The mean over the batch (B, k) of all processes, (k,); it passes no gradient on."""
    mean = certainty.mean(0)
    return torch.stack(of_all(mean)).mean(0) if processes() > 1 else mean


def _zipf(log_q: torch.Tensor, weak: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 / rank of each class, (B, C)."""
    w = F.softmax(weak, dim=-1)
    score = sum(
        values / (1 - values.gather(-1, target).sum(-1, keepdim=True) + EPSILON) for values in (w, log_q)
    )
    rank = torch.as_tensor(score).argsort(dim=-1, descending=True).argsort(dim=-1)
    return 1 / (rank + 1).to(log_q.dtype)


def _smoothed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    soft = labels if labels.ndim == 2 else F.one_hot(labels, logits.shape[-1])
    return F.cross_entropy(logits, soft.to(logits.dtype), label_smoothing=SMOOTHING)
