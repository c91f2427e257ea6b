from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from vmkd_fx.distill.data import Augmentation, Digits, batches_per_epoch, open_data, warp
from vmkd_fx.errors import DataError, UnknownNameError


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(labelled=100)


def keys(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_batches_follow_from_seed_and_epoch(digits: Digits) -> None:
    first = list(digits.train_batches(3, batch_size=32, seed=7))
    again = list(Digits(labelled=100).train_batches(3, batch_size=32, seed=7))
    assert len(first) == batches_per_epoch(len(digits), 32) == 3
    for batch, same in zip(first, again, strict=True):
        assert batch.images.shape == (32, 3, 32, 32) and batch.images.dtype == torch.float32
        assert batch.targets.shape == (32,) and batch.targets.dtype == torch.int64
        assert all(map(torch.equal, batch, same))


@pytest.mark.parametrize("other", [{"epoch": 4, "seed": 7}, {"epoch": 3, "seed": 8}])
def test_another_epoch_or_seed_shows_other_images(digits: Digits, other: dict[str, int]) -> None:
    images = next(digits.train_batches(3, batch_size=32, seed=7)).images
    others = next(digits.train_batches(**other, batch_size=32)).images
    assert not keys(images) & keys(others)


def test_global_random_state_has_no_say(digits: Digits) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = next(digits.train_batches(0, batch_size=32)).images
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = next(digits.train_batches(0, batch_size=32)).images
    assert torch.equal(first, second)


def test_start_batch_skips_and_changes_nothing(digits: Digits) -> None:
    whole = list(digits.train_batches(5, batch_size=16))
    rest = list(digits.train_batches(5, 4, batch_size=16))
    assert len(rest) == len(whole) - 4
    for batch, same in zip(whole[4:], rest, strict=True):
        assert all(map(torch.equal, batch, same))


def test_an_image_is_augmented_alike_in_any_batch(digits: Digits) -> None:
    """The batch size decides who shares a batch, not what happens to an image."""
    small = torch.cat([batch.images for batch in digits.train_batches(2, batch_size=10)])
    large = torch.cat([batch.images for batch in digits.train_batches(2, batch_size=100)])
    assert torch.equal(small, large)
    moves = Augmentation().draw(20, torch.Generator().manual_seed(0))
    images, order = torch.rand(20, 1, 32, 32), torch.randperm(20)
    assert torch.equal(warp(images, *moves)[order], warp(images[order], *(move[order] for move in moves)))


def test_no_augmentation_is_the_identity() -> None:
    still = Augmentation(rotation=0, zoom=0, shift=0, contrast=0)
    images = torch.rand(4, 1, 32, 32)
    moved = warp(images, *still.draw(4, torch.Generator()))
    assert torch.allclose(moved, images, atol=1e-5)


def test_augmentation_shifts_by_the_stated_fraction() -> None:
    images = torch.zeros(1, 1, 16, 16)
    images[..., 8, 8] = 1
    affine = torch.tensor([[[1.0, 0, 4 / 16 * 2], [0, 1, 0]]])
    moved = warp(images, affine, torch.ones(1))
    assert moved[0, 0, 8, 4] == 1 and moved.sum() == 1


def test_split_is_disjoint_stratified_and_the_same_for_every_size() -> None:
    few, many = Digits(50, augmentation=None), Digits(1000, augmentation=None)
    (few_images, few_targets, _), (many_images, many_targets, _) = (
        next(data.train_batches(0, batch_size=len(data))) for data in (few, many)
    )
    held_out, held_out_targets = few.held_out()
    assert np.array_equal(held_out, many.held_out()[0])
    validation = torch.cat([batch.images for batch in few.validation_batches()])
    assert len(validation) == 797 and len(many_images) == 1000
    assert not keys(many_images) & keys(validation)
    assert keys(few_images) < keys(many_images)
    assert torch.bincount(few_targets).tolist() == [5] * 10
    assert np.ptp(np.bincount(held_out_targets)) <= 1
    assert np.ptp(torch.bincount(many_targets).numpy()) <= 10


def test_a_runtime_repeats_the_tensors_from_uint8_bit_for_bit(digits: Digits) -> None:
    images, targets = digits.held_out()
    assert images.shape == (797, 32, 32, 3) and images.dtype == np.uint8
    mean, std = np.float32(digits.mean), np.float32(digits.std)
    repeated = ((images.astype(np.float32) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    expected = torch.cat([batch.images for batch in digits.validation_batches(100)]).numpy()
    assert np.array_equal(repeated, expected)
    assert np.array_equal(
        targets, torch.cat([batch.targets for batch in digits.validation_batches()]).numpy()
    )


def test_stated_mean_and_std_are_those_of_the_training_images() -> None:
    batches = Digits(1000, augmentation=None).train_batches(0, batch_size=1000)
    images = next(batches)[0]
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01


@pytest.mark.parametrize("labelled", [-1, 0, 9, 1001])
def test_impossible_number_of_labelled_images(labelled: int) -> None:
    with pytest.raises(DataError, match=rf"{labelled} labelled.*10 .*to 1000"):
        Digits(labelled)


def test_impossible_image_size() -> None:
    with pytest.raises(DataError, match="image_size is 4"):
        Digits(image_size=4)


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    batches = list(islice(Digits(10).train_batches(0, batch_size=64), 5))
    assert [len(batch.images) for batch in batches] == [10]


def test_open_data_by_name() -> None:
    data = open_data("digits", labelled=20, image_size=16, augment=False)
    assert len(data) == 20 and data.input_size == (3, 16, 16) and data.num_classes == len(data.labels) == 10
    with pytest.raises(UnknownNameError, match="'digit'; did you mean 'digits'"):
        open_data("digit", labelled=20, image_size=16)
