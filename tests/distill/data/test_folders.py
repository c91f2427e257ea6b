from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from tests.distill.data.pictures import make_folders, opened, picture, same
from vmkd_fx.distill.data import open_data
from vmkd_fx.errors import DataError, MissingExtraError, UnknownNameError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folders(tmp_path / "root", classes=2, train=3, val=2)


def test_classes_are_numbered_as_a_person_would(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "root", classes=11, train=1, val=1)
    data = opened(root)
    assert data.labels == tuple(f"class_{number}" for number in range(11)) and data.num_classes == 11
    _, targets = data.held_out()
    assert targets.tolist() == [*range(11)]


def test_extensions_in_mixed_case_count_and_have_an_order(root: Path) -> None:
    folder = root / "train" / "class_0"
    picture(90).save(folder / "7.JPG", "jpeg")
    picture(91).save(folder / "007.JpEg", "jpeg")
    picture(92).save(folder / "8.PNG", "png")
    data = opened(root)
    assert len(data) == 9
    names = [Path(data._train.source.describe(index)).name for index in range(6)]
    assert names == ["0.jpg", "1.jpg", "2.jpg", "007.JpEg", "7.JPG", "8.PNG"]


def test_a_tar_of_class_folders_gives_the_same_images(root: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    for part in ("train", "val"):
        with tarfile.open(packed / f"{part}.tar", "w") as archive:
            archive.add(root / part, arcname=".")
    expected, found = opened(root), opened(packed, workers=2)
    assert found.labels == expected.labels and len(found) == len(expected)
    # What this process has opened before its workers begin is not theirs to move in.
    found.sample(0, 0)
    for epoch in range(3):
        assert same(found.train_batches(epoch, batch_size=2), expected.train_batches(epoch, batch_size=2))
    assert same(found.validation_batches(), expected.validation_batches())


def test_no_such_folder_and_no_parts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        opened(tmp_path / "nowhere")
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"has no folder train \(nor train\.tar\); .* found images"):
        opened(tmp_path)
    with pytest.raises(DataError, match="needs root"):
        open_data("folder")


def test_a_folder_without_classes(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    with pytest.raises(DataError, match="train holds no images in class folders: Found 0 images"):
        opened(root)
    picture(1).save(root / "train" / "1.jpg")
    with pytest.raises(DataError, match="images that lie in no class folder"):
        opened(root)


def test_validation_with_fewer_or_other_classes(root: Path) -> None:
    shutil.move(root / "val" / "class_0", root / "kept")
    with pytest.raises(DataError, match=r"has 1 of the 2 classes .* missing: class_0"):
        opened(root)
    (root / "val" / "class_0").mkdir()
    data = opened(root)
    assert data.num_classes == 2
    assert data.held_out()[1].tolist() == [1, 1], "the number of a class is that of the training images"
    shutil.move(root / "kept", root / "val" / "class_9")
    with pytest.raises(DataError, match="1 classes that the training images do not have: class_9"):
        opened(root)


def test_a_class_without_training_images_or_with_two_folders(root: Path) -> None:
    (root / "train" / "class_1b").mkdir()
    with pytest.raises(DataError, match=r"1 class folders .* hold no image .*: class_1b; fill or remove"):
        opened(root)
    (root / "train" / "class_1b" / "class_1").mkdir()
    picture(1).save(root / "train" / "class_1b" / "class_1" / "0.jpg")
    with pytest.raises(DataError, match="two folders of the class 'class_1'"):
        opened(root)


def test_torchvisions_data_sets(root: Path) -> None:
    found, expected = open_data("torch/image_folder", root=str(root), image_size=32), opened(root)
    assert found.labels == expected.labels and len(found) == 6
    assert same(found.validation_batches(), expected.validation_batches())


def test_hugging_face_data_sets(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra hf is not installed")
    found = open_data(f"hfds/{root}", root=str(tmp_path / "cache"), image_size=32, workers=1)
    expected = opened(root)
    assert found.labels == expected.labels and len(found) == 6
    assert same(found.validation_batches(), expected.validation_batches())


@pytest.mark.parametrize("name", ["tfds/imagenet", "hfids/timm/imagenet"])
def test_a_stream_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="read as a stream"):
        open_data(name)


def test_other_names(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="'folders'; did you mean 'folder'"):
        open_data("folders", root="x")
    with pytest.raises(DataError, match=r"torch/cifar10 cannot be opened .*not found"):
        open_data("torch/cifar10", root=str(tmp_path))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"hfds/timm/mini .*vmkd-fx\[hf\]"):
        open_data("hfds/timm/mini")
