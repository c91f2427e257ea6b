"""Distillation losses as plain modules on plain tensors.

Shapes: student and teacher logits (B, C), stacked teachers (T, B, C), labels (B,). Every loss is a mean over
the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vmkd_fx.errors import UnknownNameError

CONFIDENCES = ("negative_entropy", "entropy", "none")


def confidence_weights(teachers: torch.Tensor, confidence: str = "negative_entropy") -> torch.Tensor:
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

    Returns:
        (T, B), summing to one over T.
    """
    if confidence not in CONFIDENCES:
        raise UnknownNameError("confidence", confidence, CONFIDENCES)
    if confidence == "none":
        return torch.full(teachers.shape[:2], 1 / len(teachers), dtype=teachers.dtype, device=teachers.device)
    log_p = F.log_softmax(teachers, dim=-1)
    score = (log_p.exp() * log_p).sum(-1)
    return F.softmax(score if confidence == "negative_entropy" else -score, dim=0)


class HardDistillation(nn.Module):
    """Cross-entropy with the teacher's own decision, its argmax, as the label (DeiT; STD Eq. 11): (B, C), (B,
    C) to (B,).
    """

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(student, teacher.argmax(-1), reduction="none")


class SoftDistillation(nn.Module):
    """T² KL(teacher || student) of the logits at temperature T (Hinton et al., 2015): (B, C), (B, C) to (B,).

    Summed over the classes and averaged over the batch, never over the classes too.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        log_student = F.log_softmax(student / self.temperature, dim=-1)
        log_teacher = F.log_softmax(teacher / self.temperature, dim=-1)
        divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
        return divergence * self.temperature**2


class TeacherLoss(nn.Module):
    """The loss to several teachers, weighted for each sample by their confidence (STD Eq. 11).

    Args:
        distillation: the loss to one teacher, (B, C), (B, C) to (B,).
        confidence: see `confidence_weights`.
    """

    def __init__(self, distillation: nn.Module, confidence: str = "negative_entropy") -> None:
        super().__init__()
        self.distillation = distillation
        self.confidence = confidence

    def forward(self, students: torch.Tensor, teachers: torch.Tensor) -> torch.Tensor:
        """The loss of each head to its teacher, (T, B, C) and (T, B, C) to (T,): batch means; their sum is
        L_dist.
        """
        weights = confidence_weights(teachers, self.confidence)
        losses = [self.distillation(s, t) for s, t in zip(students, teachers, strict=True)]
        return (weights * torch.stack(losses)).mean(dim=1)
