"""WebDataset shards on this machine, read by number instead of as a stream.

A shard is a tar file; its members of one name but for the extension, which begins at the first dot, are a
sample: an image, and its class as a number in NAME.cls. Where each image lies in its shard is found once, by
going from header to header, and it is then read from there directly.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vmkd_fx.distill.data.decode import decoded
from vmkd_fx.errors import DataError
from vmkd_fx.progress import progress

_IMAGES = ("jpg", "jpeg", "png", "webp")
_LABEL = "cls"
_LARGEST_LABEL = 32
"""Bytes of a class number."""


class Shards:
    """The images of several shards, in the order of the files' names and of the members within.

    Args:
        files: the shards.
        classes: names of the classes; None: their numbers, up to the largest that is met.

    Raises:
        DataError: a file is no tar file, or an image has no class.
    """

    def __init__(self, files: Sequence[Path], classes: Sequence[str] | None = None) -> None:
        self.files = tuple(files)
        places: list[tuple[int, int, int, int]] = []
        for number, file in enumerate(progress(self.files, f"index of {self.files[0].parent}")):
            places += [(number, *place) for place in _index(file)]
        if not places:
            raise DataError(f"{self.files[0].parent}: {len(self.files)} shards hold no image with a class")
        self._places = np.array(places, dtype=np.int64)
        count = int(self._places[:, 3].max()) + 1
        self.classes = tuple(map(str, range(count))) if classes is None else tuple(classes)
        if count > len(self.classes):
            raise DataError(
                f"{self.files[0].parent} has images of class {count - 1}, and the training images know "
                f"{len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """See `Source.read`."""
        shard, start, size, target = map(int, self._places[index])
        with self.files[shard].open("rb") as file:
            file.seek(start)
            return decoded(file.read(size)), target

    def describe(self, index: int) -> str:
        """See `Source.describe`."""
        shard, start, *_ = self._places[index]
        return f"{self.files[shard]} at byte {start}"


def shards_of(root: Path, part: str) -> list[Path]:
    """The shards of the "train" or "val" images: root/PART/*.tar, or those in root whose names hold PART.

    Raises:
        DataError: there are none.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; data.root is the folder of the shards")
    within = [folder for folder in root.iterdir() if folder.is_dir() and folder.name.startswith(part)]
    found = [file for folder in within for file in folder.glob("*.tar")]
    found = found or [file for file in root.glob("*.tar") if part in file.name]
    if not found:
        raise DataError(f"{root} has no shards to {part}: neither {part}*/*.tar nor *{part}*.tar")
    return sorted(found)


def _index(file: Path) -> list[tuple[int, int, int]]:
    """First byte, size and class of every image in a shard."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}"
                if not member.isfile():
                    continue
                if extension.lower() in _IMAGES:
                    images[key] = (member.offset_data, member.size)
                elif extension.lower() == _LABEL:
                    labels[key] = _label(archive, member)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{file} is no readable shard: {error}") from error
    if missing := [key for key in images if key not in labels]:
        raise DataError(
            f"{file}: {len(missing)} of {len(images)} images have no class ({missing[0]}.{_LABEL} is missing)"
        )
    return [(*place, labels[key]) for key, place in images.items()]


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    content = archive.extractfile(member)
    text = b"" if content is None else content.read(_LARGEST_LABEL)
    if not text.strip().isdigit():
        raise ValueError(f"{member.name} is no class number: {text!r}")
    return int(text)
