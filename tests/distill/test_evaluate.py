"""Accuracy on held-out images, or on some of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vmkd_fx.distill.data import Digits
from vmkd_fx.distill.evaluate import Evaluator, accuracy


class ByBrightness(nn.Module):
    """Sorts digits by how much ink they have: right now and then."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ink = x.mean((1, 2, 3))
        return -(ink[:, None] * 10 + 4 - torch.arange(10)).abs()


def test_some_of_the_images_stand_for_all() -> None:
    digits, model = Digits(labelled=10, image_size=8), ByBrightness()
    images, targets = (torch.cat(parts) for parts in list(zip(*digits.validation_batches(), strict=True))[:2])
    right = (model(images).argmax(1) == targets).float()
    every_eighth = torch.arange(100) * 797 // 100
    assert accuracy(model, digits) == pytest.approx(right.mean().item())
    few = accuracy(model, digits, count=100)
    assert few == pytest.approx(right[every_eighth].mean().item()) and few != accuracy(model, digits)
    assert Evaluator(digits, 100)(model) == few
    assert accuracy(model, digits, count=5000) == accuracy(model, digits)


def test_it_says_how_many_were_judged() -> None:
    digits = Digits(labelled=10, image_size=8)
    assert str(Evaluator(digits, 100)) == "accuracy is that of 100 of 797 held-out images, evenly spaced"
    assert {str(Evaluator(digits, count)) for count in (None, 797, 5000)} == {
        "accuracy is that of all 797 held-out images"
    }
