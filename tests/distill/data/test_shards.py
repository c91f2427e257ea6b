from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch

from tests.distill.data.pictures import picture, same
from vmkd_fx.distill.data import Images, open_data
from vmkd_fx.errors import DataError


def write(file: Path, members: dict[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def jpeg(number: int) -> bytes:
    content = io.BytesIO()
    picture(number).save(content, "jpeg", quality=90)
    return content.getvalue()


def sample(number: int, label: int) -> dict[str, bytes]:
    """What others put beside an image and its class is left alone."""
    name = f"some/{number:04}"
    return {
        f"{name}.jpg": jpeg(number),
        f"{name}.cls": str(label).encode(),
        f"{name}.json": b"{}",
        f"{name}.mask.png": b"",
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten pictures of three classes in two shards, and three to judge on."""
    shards = [range(6), range(6, 10)]
    for number, inside in enumerate(shards):
        members = [item for at in inside for item in sample(at, at % 3).items()]
        write(tmp_path / f"set-train-{number:03}.tar", dict(members))
    members = [item for at in range(3) for item in sample(20 + at, at).items()]
    write(tmp_path / "set-validation-000.tar", dict(members))
    return tmp_path


def opened(root: Path, **options: object) -> Images:
    data = open_data("wds", root=str(root), image_size=24, **options)  # type: ignore[arg-type]
    assert isinstance(data, Images)
    return data


def test_every_image_can_be_had_by_its_number(root: Path) -> None:
    data = opened(root, augment=False)
    assert len(data) == 10 and data.labels == ("0", "1", "2")
    for number in (9, 0, 6):
        image, target = data._train.source.read(number)
        assert target == number % 3
        assert image.tobytes() == _decoded(jpeg(number))
    numbers = torch.cat([batch.indices for batch in data.train_batches(0, batch_size=5)])
    assert sorted(numbers.tolist()) == [*range(10)]
    assert data.held_out()[1].tolist() == [0, 1, 2]
    assert "set-train-001.tar at byte" in data._train.source.describe(6)


def _decoded(content: bytes) -> bytes:
    from PIL import Image

    return Image.open(io.BytesIO(content)).convert("RGB").tobytes()


def test_workers_and_folders_of_shards_give_the_same(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for part, name in (("train", "train"), ("val", "validation")):
        (other / part).mkdir(parents=True)
        for file in root.glob(f"*{name}*.tar"):
            (other / part / file.name).write_bytes(file.read_bytes())
    expected = list(opened(root).train_batches(1, batch_size=4, seed=2))
    assert same(opened(other, workers=2).train_batches(1, batch_size=4, seed=2), expected)


def test_what_is_no_set_of_shards_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no shards to train"):
        opened(tmp_path / "empty")
    write(root / "set-train-002.tar", {"a.jpg": jpeg(1)})
    with pytest.raises(DataError, match=r"1 of 1 images have no class \(/a\.cls is missing\)"):
        opened(root)
    write(root / "set-train-002.tar", {"a.jpg": jpeg(1), "a.cls": b"cat"})
    with pytest.raises(DataError, match=r"a\.cls is no class number: b'cat'"):
        opened(root)
    (root / "set-train-002.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(DataError, match="is no readable shard"):
        opened(root)
    (root / "set-train-002.tar").unlink()
    write(root / "set-validation-001.tar", sample(30, 3))
    with pytest.raises(DataError, match="images of class 3, and the training images know 3 classes"):
        opened(root)
