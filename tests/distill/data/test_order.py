from __future__ import annotations

import pytest
import torch

from vmkd_fx.distill.data.order import epoch_order, permutation, train_slices, validation_slices
from vmkd_fx.errors import DataError


def test_an_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    order = epoch_order(100, seed=3, epoch=5)
    assert sorted(order.tolist()) == [*range(100)]
    assert torch.equal(order, permutation(100, 3, 5))
    assert not torch.equal(order, permutation(100, 3, 6))
    assert not torch.equal(order, permutation(100, 4, 5))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_processes_together_have_the_batches_of_one(world_size: int) -> None:
    whole = [[*range(*part.indices(99))] for part in train_slices(99, 12, 2)]
    ranks = [train_slices(99, 12, 2, rank, world_size) for rank in range(world_size)]
    parts = [[i for part in parts for i in range(*part.indices(99))] for parts in zip(*ranks, strict=True)]
    assert parts == whole and whole[0] == [*range(24, 36)] and len(whole) == 8 - 2


@pytest.mark.parametrize(("images", "batch_size"), [(100, 9), (7, 8)])
def test_a_batch_that_cannot_be_shared_out_is_refused(images: int, batch_size: int) -> None:
    with pytest.raises(DataError, match=f"a batch of {min(images, batch_size)} images .* to 2 processes"):
        next(train_slices(images, batch_size, 0, 0, 2))


@pytest.mark.parametrize("images", [1, 9, 10, 11, 797])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_held_out_image_is_judged_once(images: int, world_size: int) -> None:
    shares = [[*validation_slices(images, 5, rank, world_size)] for rank in range(world_size)]
    assert [i for share in shares for part in share for i in range(images)[part]] == [*range(images)]
    assert all(0 < part.stop - part.start <= 5 for share in shares for part in share)
    if images >= world_size * 5:
        assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_images_are_other_samples_and_never_mixed_with_themselves(repeats: int) -> None:
    images = 101
    order = epoch_order(images, seed=0, epoch=1, repeats=repeats)
    assert len(order) == images == len(set(order.tolist()))
    times = torch.bincount(order % images, minlength=images)
    assert times.max() == repeats and (times == repeats).sum() >= images // repeats - 2
    pairs = (order[:-1] % images).view(-1, 2)
    assert bool((pairs[:, 0] != pairs[:, 1]).all())
