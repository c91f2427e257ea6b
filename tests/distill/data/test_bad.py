from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from tests.distill.data.pictures import make_folders, opened, same
from vmkd_fx.errors import DataError

HALF = "train/class_0/3.jpg"
EMPTY = "train/class_1/4.jpg"
TEXT = "val/class_2/1.jpg"


@pytest.fixture
def damaged(folders: Path, tmp_path: Path) -> Path:
    """A half-written picture and one without a byte to train on, a text to judge on."""
    root = tmp_path / "damaged"
    shutil.copytree(folders, root)
    whole = (root / HALF).read_bytes()
    (root / HALF).write_bytes(whole[: len(whole) // 2])
    (root / EMPTY).write_bytes(b"")
    (root / TEXT).write_text("no picture")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_counted_and_named(
    damaged: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = opened(damaged, max_bad=0.1, workers=workers)
    with caplog.at_level(logging.WARNING, "vmkd_fx"):
        for _ in range(2):
            batches = list(data.train_batches(0, batch_size=12))
    names = {Path(bad.name).parts[-2:] for bad in data.bad_images}
    assert names == {("class_0", "3.jpg"), ("class_1", "4.jpg")}
    assert len(caplog.messages) == 2, "each is named once"
    assert any(
        "4.jpg cannot be read and is replaced by the next one: the file is empty" in line
        for line in caplog.messages
    )
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == [*range(36)]


def test_a_bad_image_becomes_the_next_one_and_no_other_changes(damaged: Path, folders: Path) -> None:
    found = opened(damaged, max_bad=0.1, augment=False)
    sound = opened(folders, augment=False)
    for index in range(36):
        image, target = found.sample(index, 0)
        expected, label = sound.sample({3: 4, 16: 17}.get(index, index), 0)
        assert torch.equal(image, expected) and target == label
    assert same(
        found.train_batches(1, batch_size=8),
        opened(damaged, max_bad=0.1, augment=False).train_batches(1, batch_size=8),
    )


def test_a_bad_image_to_judge_on_is_left_out(damaged: Path, folders: Path) -> None:
    data = opened(damaged, max_bad=0.1)
    assert [batch.indices.tolist() for batch in data.validation_batches(5)] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 12, 13, 14],
    ]
    pixels, targets = data.held_out()
    assert len(pixels) == len(targets) == 14
    assert [(bad.name, bad.reason) for bad in data.bad_images] == [
        ("class_2/1.jpg", "no image of a known format")
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_stop_with_their_names(damaged: Path, workers: int) -> None:
    data = opened(damaged, max_bad=0.03, workers=workers)
    with pytest.raises(DataError, match=r"2 of 36 training images .* at most 1 may be bad") as caught:
        list(data.train_batches(0, batch_size=36))
    assert "class_0/3.jpg: OSError: Truncated File Read" in str(caught.value)
    assert "class_1/4.jpg: the file is empty" in str(caught.value)
    with pytest.raises(DataError, match=r"1 of 15 validation images"):
        list(data.validation_batches())


def test_nothing_but_bad_images(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "all", classes=2, train=2, val=1)
    for path in (root / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="4 of 4 training images"):
        next(opened(root, max_bad=1.0).train_batches(0, batch_size=2))
