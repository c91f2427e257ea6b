"""Accuracy on held-out images."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from vmkd_fx.distill.data import ImageData, open_data
from vmkd_fx.errors import DataError

if TYPE_CHECKING:
    from vmkd_fx.distill.card import Card

_logger = logging.getLogger(__name__)


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData, count: int | None = None) -> float:
    """The share of the held-out images whose largest logit is the right one, 0 to 1; `model` is in eval
    mode. `count` of them are judged, evenly spaced; None: all.
    """
    right = total = 0
    for images, targets, _ in data.validation_batches(count=count):
        right += int((model(images).argmax(-1) == targets).sum())
        total += len(targets)
    return right / total


@dataclass(frozen=True)
class Evaluator:
    """Module to accuracy on the images that a student was trained for; as a text, on how many of them.

    Attributes:
        data: the images.
        count: of the held-out ones, that are judged; None: all.
    """

    data: ImageData
    count: int | None = None

    def __call__(self, model: nn.Module) -> float:
        return accuracy(model, self.data, self.count)

    def __str__(self) -> str:
        every = self.data.num_held_out
        if self.count is None or self.count >= every:
            return f"accuracy is that of all {every} held-out images"
        return f"accuracy is that of {self.count} of {every} held-out images, evenly spaced"


def evaluator(card: Card, count: int | None = None) -> Evaluator | None:
    """What judges a module on the data that the student was trained for; None where its card names none, or
    where it is not on this machine, which is logged.

    Args:
        card: of the student.
        count: held-out images that are judged; None: all.
    """
    if card.data is None:
        return None
    try:
        return Evaluator(open_data(**card.data), count)
    except DataError as error:
        _logger.warning("accuracy is not measured: %s", error)
        return None
