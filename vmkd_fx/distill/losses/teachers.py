"""Several teachers, each weighted by its confidence (STD Eq. 10 to 12)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vmkd_fx.errors import UnknownNameError
from vmkd_fx.passes.heads.full_precision import in_full_precision
from vmkd_fx.passes.heads.joined import of_all, processes

CONFIDENCES = ("negative_entropy", "entropy", "none")
VARIANTS = ("paper", "batch_mean", "third_party")


@in_full_precision
def entropy(logits: torch.Tensor) -> torch.Tensor:
    """-Σ p log p of the softmax over the last axis, in nats: (..., C) to (...). Saturated logits give 0."""
    log_p = F.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


@in_full_precision
def confidence_weights(
    teachers: torch.Tensor, confidence: str = "negative_entropy", variant: str = "paper"
) -> torch.Tensor:
    """How much each teacher counts for each sample: a softmax over the teachers of their confidence S (STD
    Eq. 10 and 11).

    Eq. 10 as printed, S = -sum p log p, is the entropy, which gives the *less* sure teacher more weight,
    while the text calls S the negative entropy and a measure of confidence. The text's intent is the default
    here:

    - "negative_entropy": S = sum p log p, the surer teacher counts more;
    - "entropy": S as printed;
    - "none": all teachers count the same.

    Args:
        teachers: logits (T, B, C).
        variant: "paper", each sample has weights of its own; "batch_mean", S is averaged over the batch;
            "third_party", S is summed over the batch, as in github.com/devrimcavusoglu/std, so that the
            weights harden with the batch size. The latter two give every sample the same weights; their
            batch is that of all processes.

    Returns:
        (T, B), summing to one over T.
    """
    if confidence not in CONFIDENCES:
        raise UnknownNameError("confidence", confidence, CONFIDENCES)
    if variant not in VARIANTS:
        raise UnknownNameError("variant", variant, VARIANTS)
    if confidence == "none":
        return torch.full(teachers.shape[:2], 1 / len(teachers), dtype=teachers.dtype, device=teachers.device)
    score = entropy(teachers)
    if confidence == "negative_entropy":
        score = -score
    if variant != "paper":
        joined = torch.cat(of_all(score), 1) if processes() > 1 else score
        whole = joined.mean(1, keepdim=True) if variant == "batch_mean" else joined.sum(1, keepdim=True)
        score = whole.expand_as(score)
    return F.softmax(score, dim=0)


class TeacherLoss(nn.Module):
    """The loss to several teachers, weighted for each sample by their confidence (STD Eq. 11).

    Args:
        distillation: the loss to one teacher, (B, C), (B, C) to (B,); with labels where they are given.
        confidence, variant: see `confidence_weights`.
    """

    def __init__(
        self, distillation: nn.Module, confidence: str = "negative_entropy", variant: str = "paper"
    ) -> None:
        super().__init__()
        self.distillation = distillation
        self.confidence = confidence
        self.variant = variant

    @in_full_precision
    def forward(
        self, students: torch.Tensor, teachers: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of each head to its teacher, (T, B, C) and (T, B, C) to (T,): batch means; their sum is
        L_dist. Labels (B,) or (B, C) for losses that look at them.
        """
        weights = confidence_weights(teachers, self.confidence, self.variant)
        given = () if labels is None else (labels,)
        losses = [self.distillation(s, t, *given) for s, t in zip(students, teachers, strict=True)]
        return (weights * torch.stack(losses)).mean(dim=1)


def class_and_distillation(class_loss: torch.Tensor, dist_loss: torch.Tensor, alpha: float) -> torch.Tensor:
    """L = (1 - α) L_class + α L_dist (STD Eq. 12)."""
    return (1 - alpha) * class_loss + alpha * dist_loss
