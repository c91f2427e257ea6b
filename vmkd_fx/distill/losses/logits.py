"""What the logit losses share: labels as classes, and distributions over the classes but the target."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from vmkd_fx.errors import ModelError, RecipeError


def check_logits(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Raises:
    ModelError: the two do not have the same shape, so they do not speak of the same classes.
    """
    if student.shape != teacher.shape:
        raise ModelError(
            f"student logits are {tuple(student.shape)} and teacher logits {tuple(teacher.shape)}; "
            "both must be of the same images and the same classes"
        )


def check_positive(**settings: float) -> None:
    """Raises:
    RecipeError: a temperature is not a number above 0.
    """
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise RecipeError(f"{name} must be above 0, got {value!r}")


def target_classes(labels: torch.Tensor | None, logits: torch.Tensor, loss: str) -> torch.Tensor:
    """Labels (B,) as they are, soft labels (B, C) as their argmax: (B,).

    Raises:
        RecipeError: there are no labels.
        ModelError: there are fewer than two classes, or soft labels for other classes.
    """
    if labels is None:
        raise RecipeError(f"{loss} needs labels: call it with (student, teacher, labels)")
    if logits.shape[-1] < 2:
        raise ModelError(f"{loss} needs a class beside the target, the logits have {logits.shape[-1]}")
    if labels.ndim == 1:
        return labels
    check_logits(logits, labels)
    return labels.argmax(-1)


def is_target(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """(B, C), True at each sample's target, or targets (B, K)."""
    classes = torch.arange(logits.shape[-1], device=logits.device)
    if target.ndim == 1:
        return classes == target[:, None]
    return (classes == target[..., None]).any(1)


def log_softmax_without(logits: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """The log-distribution over the classes that are not left out, (B, C), with 0 at those that are."""
    rest = F.log_softmax(logits.masked_fill(left_out, -math.inf), dim=-1)
    return rest.masked_fill(left_out, 0)


def softmax_without(logits: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """The distribution over the classes that are not left out, (B, C), with 0 at those that are."""
    return F.softmax(logits.masked_fill(left_out, -math.inf), dim=-1)


def pick(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Each sample's value at its target: (B, C), (B,) to (B,)."""
    return values.gather(-1, target[:, None]).squeeze(-1)
