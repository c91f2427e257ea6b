"""DKD's loss grows over the first epochs, where it is asked to."""

from __future__ import annotations

import pytest
import torch

from vmkd_fx.distill.methods import Batch, resolve
from vmkd_fx.errors import RecipeError


def weight(warmup_epochs: int, epoch: int | None) -> float:
    logits = {"logits": torch.randn(4, 10, generator=torch.Generator().manual_seed(0))}
    method = resolve("dkd", {"weight": 0.5, "warmup_epochs": warmup_epochs})
    (term,) = method.terms(Batch(logits, [logits], torch.arange(4), epoch))
    return term.weight


def test_the_weight_grows_by_the_same_part_in_every_epoch() -> None:
    """As the authors' code has it, which counts epochs from 1: epoch / 20, then 1."""
    assert [weight(20, epoch) for epoch in (0, 9, 19, 20, 300)] == pytest.approx([0.025, 0.25, 0.5, 0.5, 0.5])
    assert [weight(0, epoch) for epoch in (None, 0)] == [0.5, 0.5]
    assert weight(1, 0) == 0.5, "one epoch of warm-up, as for ImageNet, is none"


def test_only_with_a_warm_up_the_epoch_must_be_told() -> None:
    assert not resolve("dkd").needs_epoch and resolve("dkd", {"warmup_epochs": 20}).needs_epoch


def test_a_warm_up_is_a_whole_number() -> None:
    with pytest.raises(RecipeError, match=r"warmup_epochs is a whole number from 0, got 0\.5"):
        resolve("dkd", {"warmup_epochs": 0.5})
