"""Where images come from: timm's readers and torchvision's data sets, asked for one image at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset

from vmkd_fx.distill.data.bad import Source
from vmkd_fx.distill.data.decode import decoded
from vmkd_fx.distill.data.folders import check_folder, check_leaves, in_fixed_order, part_of
from vmkd_fx.distill.data.shards import Shards, shards_of
from vmkd_fx.errors import DataError
from vmkd_fx.extras import require

# timm's prefixes of data sets that can be asked for any image, and of those that come as a stream.
PREFIXES = ("hfds", "torch")
STREAMS = ("hfids", "tfds", "wds")


class ReaderSource:
    """Images of one of timm's readers.

    Args:
        reader: gives an open file and a class for a number.
        classes: their names, in the order of the logits.
        renumbered: the class that the reader's class stands for; None: itself.
    """

    def __init__(self, reader: Any, classes: Sequence[str], renumbered: Sequence[int] | None = None) -> None:
        self.reader, self.classes, self.renumbered = reader, tuple(classes), renumbered

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """See `Source.read`."""
        file, target = self.reader[index]
        with file:
            image = decoded(file.read())
        return image, target if self.renumbered is None else self.renumbered[target]

    def describe(self, index: int) -> str:
        """See `Source.describe`."""
        return str(self.reader.filename(index) or f"number {index}")


class TorchvisionSource:
    """Images of one of torchvision's data sets, which gives them decoded."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name
        # torchvision's ImageNet has several names a class.
        self.classes = tuple(
            known if isinstance(known, str) else ", ".join(known) for known in dataset.classes
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """See `Source.read`."""
        image, target = self.dataset[index]
        return image.convert("RGB"), int(target)

    def describe(self, index: int) -> str:
        """See `Source.describe`."""
        return f"{self.name} number {index}"


def open_folder(root: Path) -> tuple[Source, Source]:
    """Training and validation images of `root`: train and val, each class folders or a tar of them.

    Raises:
        DataError: a part is missing, holds no class folders, or the two know other classes.
    """
    train, classes = _reader(part_of(root, "train"))
    held_out, found = _reader(part_of(root, "val"))
    number = {name: place for place, name in enumerate(classes)}
    empty = check_folder(part_of(root, "val"), held_out, empty_ones=True)
    if unknown := [name for name in found if name not in number]:
        raise DataError(
            f"{part_of(root, 'val')} holds {len(unknown)} classes that the training images do not have: "
            f"{_some(unknown)}"
        )
    if missing := [name for name in classes if name not in {*found, *empty}]:
        raise DataError(
            f"{part_of(root, 'val')} has {len(found)} of the {len(classes)} classes of the training images; "
            f"missing: {_some(missing)}. If that is how it should be, make an empty folder for each of them"
        )
    return ReaderSource(train, classes), ReaderSource(held_out, classes, [number[name] for name in found])


def open_shards(root: Path) -> tuple[Source, Source]:
    """Training and validation images of WebDataset shards in `root`, see `shards_of`.

    Raises:
        DataError: there are none, or they hold no images with classes.
    """
    train = Shards(shards_of(root, "train"))
    return train, Shards(shards_of(root, "val"), train.classes)


def _reader(part: Path) -> tuple[Any, tuple[str, ...]]:
    """timm's reader of a folder or tar, in an order that is the same everywhere, and its classes."""
    # An open tar file has one position, which workers forked from this process would move for each other.
    options = {} if part.is_dir() else {"cache_tarfiles": False}
    try:
        reader = create_dataset("", root=str(part), search_split=False, **options).reader
    # "Found 0 images", no tar file, a damaged tar file: one kind of error each.
    except Exception as error:
        raise DataError(
            f"{part} holds no images in class folders: {str(error) or type(error).__name__}"
        ) from error
    known: dict[str, int] = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
    classes = tuple(sorted(known, key=lambda name: known[name]))
    if "" in classes or len(known) < 1:
        raise DataError(
            f"{part} holds images that lie in no class folder; put each into the folder of its class, "
            f"as in {part}/cat/1.jpg"
        )
    if part.is_dir():
        check_leaves(part, reader)
        check_folder(part, reader, empty_ones=part.name.startswith("val"))
        in_fixed_order(reader)
    return reader, classes


def open_named(name: str, root: Path | None) -> tuple[Source, Source]:
    """Training and validation images of a data set of timm's: "hfds/OWNER/NAME" or "torch/NAME".

    Raises:
        DataError: it is a stream, it cannot be opened, or it has no class names.
        MissingExtraError: the package that reads it is not installed.
    """
    prefix = name.split("/")[0].lower()
    if prefix in STREAMS:
        raise DataError(
            f"{name} is read as a stream, and a stream cannot give image i of epoch e on demand, on which "
            "exact resume and several processes rest. WebDataset shards on this machine can (name: wds, "
            "root: their folder), and a Hugging Face data set as hfds/OWNER/NAME"
        )
    if prefix == "hfds":
        require("datasets", extra="hf", purpose=f"the data set {name}")
        return _hugging_face(name, root, ("train",)), _hugging_face(name, root, ("validation", "test"))
    train, held_out = (_opened(name, root, (part,), search_split=True) for part in ("train", "validation"))
    return TorchvisionSource(train, name), TorchvisionSource(held_out, name)


def _hugging_face(name: str, root: Path | None, splits: Sequence[str]) -> Source:
    reader = _opened(name, root, splits).reader
    classes = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    if not classes:
        raise DataError(f"{name} does not say which classes its labels stand for, and they cannot be counted")
    return ReaderSource(reader, classes)


def _opened(name: str, root: Path | None, splits: Sequence[str], **options: Any) -> Any:
    """The first of `splits` that there is."""
    reasons = []
    for split in splits:
        try:
            return create_dataset(name, root=None if root is None else str(root), split=split, **options)
        # Each library has its own error for what is not there, or not reachable.
        except Exception as error:
            reasons.append(f"{split}: {type(error).__name__}: {error}")
    raise DataError(f"the data set {name} cannot be opened ({'; '.join(reasons)})")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
