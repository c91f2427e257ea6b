"""Accuracy on held-out images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from vmkd_fx.distill.data import ImageData, open_data

if TYPE_CHECKING:
    from vmkd_fx.distill.card import Card


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData) -> float:
    """The share of the held-out images whose largest logit is the right one, 0 to 1; `model` is in eval
    mode.
    """
    right = total = 0
    for images, targets in data.validation_batches():
        right += int((model(images).argmax(-1) == targets).sum())
        total += len(targets)
    return right / total


def evaluator(card: Card) -> Callable[[nn.Module], float] | None:
    """Module to accuracy on the data that the student was trained for; None where its card names none."""
    if card.data is None:
        return None
    data = open_data(**card.data)
    return lambda model: accuracy(model, data)
