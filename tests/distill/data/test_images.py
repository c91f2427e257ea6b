from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from tests.distill.data.pictures import joined, opened, picture, same
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.distill.data import Batch, Images, View
from vmkd_fx.distill.data.keyed import kept_generators, seed_generators
from vmkd_fx.distill.data.transforms import evaluation_transform, posterize, training_transform
from vmkd_fx.errors import DataError


def course(data: Images, epoch: int = 1, start: int = 0, **options: int) -> list[Batch]:
    return list(data.train_batches(epoch, start, batch_size=8, seed=3, **options))


@pytest.fixture(scope="module")
def expected(folders: Path) -> list[Batch]:
    return course(opened(folders, mixing={}))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_tensors(
    workers: int, folders: Path, expected: list[Batch]
) -> None:
    data = opened(folders, mixing={}, workers=workers)
    assert same(course(data), expected)
    other = course(data, epoch=2)
    assert not same(other, expected), "workers that live on have to see the epoch"
    given_up = data.train_batches(1, batch_size=8, seed=3)
    next(given_up)
    given_up.close()
    assert same(course(data, start=2), expected[2:])
    both = zip(data.train_batches(1, batch_size=8, seed=3), course(data), strict=True)
    assert all(same([one], [other]) for one, other in both)
    assert same(data.validation_batches(4), opened(folders).validation_batches(4))


def test_two_processes_have_the_halves_of_each_batch(folders: Path, expected: list[Batch]) -> None:
    data = opened(folders, mixing={})
    assert same(joined(course(data, rank=rank, world_size=2) for rank in range(2)), expected)
    held_out = [list(data.validation_batches(4, rank=rank, world_size=2)) for rank in range(2)]
    numbers = torch.cat([batch.indices for share in held_out for batch in share])
    assert numbers.tolist() == [*range(15)]


def test_nothing_before_the_first_batch_is_loaded(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(folders)
    read: list[int] = []
    source = data._train.source
    monkeypatch.setattr(type(source), "read", _noting(type(source).read, read))
    batches = data.train_batches(0, 2, batch_size=8)
    batch = next(batches)
    assert read == batch.indices.tolist()


def _noting(read, numbers):  # type: ignore[no-untyped-def]
    def noted(self, index):  # type: ignore[no-untyped-def]
        numbers.append(index)
        return read(self, index)

    return noted


def test_a_sample_is_the_same_alone_and_in_its_batch(folders: Path) -> None:
    data = opened(folders, repeats=3)
    batch = next(data.train_batches(4, batch_size=12, seed=2))
    seen = len(data)
    assert len(set((batch.indices % seen).tolist())) == 4
    for image, target, index in zip(*batch, strict=True):
        alone, label = data.sample(int(index), 4, 2)
        assert torch.equal(alone, image) and label == target
    same_image = batch.images[batch.indices % seen == batch.indices[0] % seen]
    assert len(same_image) == 3 and not torch.equal(same_image[0], same_image[1])


def test_global_random_numbers_have_no_say_and_are_left_alone(folders: Path, expected: list[Batch]) -> None:
    random.seed(8)
    np.random.seed(8)
    torch.manual_seed(8)
    data = opened(folders, mixing={}, workers=1)
    assert same(course(data), expected)
    assert same(course(opened(folders, mixing={})), expected)
    found = (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(8)
    np.random.seed(8)
    torch.manual_seed(8)
    assert found == (random.random(), np.random.rand(), torch.rand(()).item())


def test_without_augmentation_training_images_are_seen_as_for_evaluation(folders: Path) -> None:
    data = opened(folders, augment=False)
    image, _ = data.sample(5, 0)
    view = View((3, 32, 32), data.mean, data.std)
    file, _ = data._train.source.read(5)
    assert torch.equal(image, view.normalise(evaluation_transform(view)(file)))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_augmentation_is_timms_bit_for_bit(mode: str) -> None:
    """From one state of the random generators, erasing included."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    given = {
        "auto_augment": "rand-m7-mstd0.5",
        "re_prob": 0.7,
        "re_mode": mode,
        "re_count": 2,
        "scale": (0.3, 1),
    }
    ours = training_transform(View((3, 24, 24), mean, std), given)
    timms = create_transform(
        (3, 24, 24), is_training=True, mean=mean, std=std, interpolation="random", **given
    )
    image, seen = picture(1), set()
    with kept_generators():
        for key in range(20):
            seed_generators(0, 0, key)
            found = ours(image)
            seed_generators(0, 0, key)
            assert torch.equal(found, timms(image))
            seen.add(found.numpy().tobytes())
    assert len(seen) == 20


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(50, 40), (31, 77), (32, 32), (20, 9)])
def test_evaluation_is_timms_and_the_bundles_bit_for_bit(
    crop_mode: str, interpolation: str, size: tuple[int, int]
) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    view = View((3, 24, 24), mean, std, interpolation, 0.9, crop_mode)
    image = picture(1, size)
    found = view.normalise(evaluation_transform(view)(image))
    timms = create_transform(
        (3, 24, 24), mean=mean, std=std, interpolation=interpolation, crop_pct=0.9, crop_mode=crop_mode
    )
    assert torch.equal(found, timms(image))
    bundles = Preprocess((3, 24, 24), mean, std, interpolation, 0.9, crop_mode)
    assert np.array_equal(found.numpy(), bundles(image))


def test_held_out_pixels_become_the_validation_tensors_bit_for_bit(folders: Path) -> None:
    data = opened(folders)
    pixels, targets = data.held_out()
    assert pixels.shape == (15, 32, 32, 3) and pixels.dtype == np.uint8
    batches = list(data.validation_batches(4))
    bundles = Preprocess(data.input_size, data.mean, data.std, data.interpolation, data.crop_pct)
    assert np.array_equal(bundles.normalise(pixels), torch.cat([batch.images for batch in batches]).numpy())
    assert (
        targets.tolist()
        == torch.cat([batch.targets for batch in batches]).tolist()
        == [0] * 5 + [1] * 5 + [2] * 5
    )
    (few,) = data.validation_batches(count=3)
    assert few.indices.tolist() == [0, 5, 10] and few.targets.tolist() == [0, 1, 2]
    assert torch.equal(few.images, torch.cat([batch.images for batch in batches])[::5])
    path = sorted((folders / "val" / "class_0").iterdir())[0]
    assert np.array_equal(bundles.pixels(Image.open(path)), pixels[0])


def test_transforms_that_timm_does_not_make_are_refused(folders: Path) -> None:
    with pytest.raises(DataError, match=r"timm makes no transform from .*auto_augment='nonsense'"):
        opened(folders, augmentation={"auto_augment": "nonsense"})
    with pytest.raises(DataError, match="interpolation='cubic'"):
        opened(folders, interpolation="cubic")


def test_workers_do_not_keep_a_training_from_ending(folders: Path) -> None:
    """A process that stops in the middle of an epoch, with its workers alive, ends at once."""

    def stop_in_the_middle() -> None:
        global _left
        _left = opened(folders, workers=2).train_batches(0, batch_size=4)
        next(_left)

    process = multiprocessing.get_context("fork").Process(target=stop_in_the_middle)
    process.start()
    process.join(timeout=60)
    ended = process.exitcode
    process.kill()
    assert ended == 0


@pytest.mark.parametrize(
    "policy", ["rand-m10-mstd2-inc1", "rand-m10-mmax10", "augmix-m10-w2", "original-mstd2", "3a"]
)
def test_no_policy_asks_for_what_pillow_refuses(policy: str) -> None:
    view = View((3, 16, 16), (0.5,) * 3, (0.2,) * 3)
    transform = training_transform(view, {"auto_augment": policy})
    image = picture(1, (24, 20))
    with kept_generators():
        for key in range(150):
            seed_generators(0, 0, key)
            assert transform(image).shape == (3, 16, 16)


def test_posterizing_to_few_bits() -> None:
    pixels = np.asarray(picture(1)).astype(np.int64)
    for bits in range(10):
        lost = 2 ** max(8 - bits, 0)
        assert np.array_equal(np.asarray(posterize(picture(1), bits)), pixels // lost * lost)


def test_an_augmentation_that_fails_names_the_image(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(folders)
    monkeypatch.setattr(data._train, "transform", lambda image: image.no_such_method())
    with pytest.raises(
        DataError, match=r"class_1/0\.jpg cannot be augmented \(seed 5, epoch 2, sample 12\): Attrib"
    ):
        data.sample(12, 2, 5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_refusal_in_a_worker_is_the_one_of_this_process(folders: Path, workers: int) -> None:
    data = opened(folders, mixing={"mixup": 0.8}, workers=workers)
    with pytest.raises(DataError, match=r"^mixing pairs neighbours and 3 images at position 0"):
        next(data.train_batches(0, batch_size=3))
