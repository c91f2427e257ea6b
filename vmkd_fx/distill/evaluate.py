"""Accuracy on held-out images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from vmkd_fx.distill.data import ImageData, open_data
from vmkd_fx.errors import DataError

if TYPE_CHECKING:
    from vmkd_fx.distill.card import Card

_logger = logging.getLogger(__name__)


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData) -> float:
    """The share of the held-out images whose largest logit is the right one, 0 to 1; `model` is in eval
    mode.
    """
    right = total = 0
    for images, targets, _ in data.validation_batches():
        right += int((model(images).argmax(-1) == targets).sum())
        total += len(targets)
    return right / total


def evaluator(card: Card) -> Callable[[nn.Module], float] | None:
    """Module to accuracy on the data that the student was trained for; None where its card names none, or
    where it is not on this machine, which is logged.
    """
    if card.data is None:
        return None
    try:
        data = open_data(**card.data)
    except DataError as error:
        _logger.warning("accuracy is not measured: %s", error)
        return None
    return lambda model: accuracy(model, data)
