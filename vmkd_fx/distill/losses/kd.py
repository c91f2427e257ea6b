"""Knowledge distillation from logits: the teacher's decision, or its whole distribution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vmkd_fx.distill.losses.logits import check_logits, check_positive
from vmkd_fx.passes.heads.full_precision import in_full_precision


class HardDistillation(nn.Module):
    """Cross-entropy with the teacher's own decision, its argmax, as the label (DeiT; STD Eq. 11).

    (B, C), (B, C) to (B,): per sample, mean it yourself. Labels may be given and are not looked at.
    """

    @in_full_precision
    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_logits(student, teacher)
        return F.cross_entropy(student, teacher.argmax(-1), reduction="none")


class SoftDistillation(nn.Module):
    """T² KL(teacher || student) of the logits at temperature T (Hinton et al., 2015).

    (B, C), (B, C) to (B,): per sample, summed over the classes; its mean is what PyTorch calls "batchmean".
    PyTorch's reduction "mean" would divide by the classes too and is C times smaller. Labels may be given and
    are not looked at.

    Args:
        temperature: T, above 0.
        keep_entropy: T² times the cross-entropy -Σ p log q instead, as the authors of NKD write KD. It is
            larger by T² times the teacher's entropy, which has no gradient.
    """

    def __init__(self, temperature: float = 1.0, keep_entropy: bool = False) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.keep_entropy = keep_entropy

    @in_full_precision
    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_logits(student, teacher)
        log_student = F.log_softmax(student / self.temperature, dim=-1)
        log_teacher = F.log_softmax(teacher / self.temperature, dim=-1)
        if self.keep_entropy:
            divergence = -(log_teacher.exp() * log_student).sum(-1)
        else:
            divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
        return divergence * self.temperature**2
