"""A data set by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmkd_fx.distill.data.bad import Source
from vmkd_fx.distill.data.digits import Augmentation, Digits
from vmkd_fx.distill.data.images import Images
from vmkd_fx.distill.data.mixing import Mixing
from vmkd_fx.distill.data.protocol import ImageData
from vmkd_fx.distill.data.sources import PREFIXES, STREAMS, open_folder, open_named, open_shards
from vmkd_fx.distill.data.transforms import View
from vmkd_fx.errors import DataError, UnknownNameError
from vmkd_fx.graph.info import IMAGENET_MEAN, IMAGENET_STD

FOLDER, SHARDS = "folder", "wds"
DATASETS = (Digits.name, FOLDER, SHARDS)

_SIZES = {Digits.name: 32}
_SIZE = 224


def data_names(asked: str) -> tuple[str, ...]:
    """The names that data sets have; `asked` itself among them if it is one of timm's "prefix/name"."""
    prefix, slash, rest = asked.partition("/")
    return (*DATASETS, asked) if slash and rest and prefix.lower() in (*PREFIXES, *STREAMS) else DATASETS


def open_data(
    name: str,
    *,
    root: str | None = None,
    labelled: int = 200,
    image_size: int | None = None,
    augment: bool = True,
    augmentation: Mapping[str, Any] | None = None,
    mixing: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    crop_mode: str = "center",
    **loading: Any,
) -> ImageData:
    """The data set called `name`: "digits", "folder", "wds", or "hfds/OWNER/NAME" or "torch/NAME" of timm's.

    Args:
        name: of the data set.
        root: folder of the images; "digits" has none.
        labelled: training images of "digits"; other data sets have theirs.
        image_size: height and width in pixels; None: 32 for "digits", 224 for others.
        augment: False trains on the images as they are.
        augmentation: see `Images`; "digits" has its own.
        mixing: keyword arguments of `Mixing`; None: images are not mixed.
        mean, std: normalisation; None: ImageNet's. "digits" has its own.
        interpolation, crop_pct, crop_mode: of the evaluation transform.
        loading: repeats, workers, prefetch, pin_memory and max_bad, see `Images`; "digits" lies in memory
            and has no use for them.

    Raises:
        UnknownNameError: there is no such data set.
        DataError: it cannot be had, or not like this.
        MissingExtraError: the package that reads it is not installed.
    """
    if name not in data_names(name):
        raise UnknownNameError("data set", name, DATASETS)
    size = image_size or _SIZES.get(name, _SIZE)
    mixed = None if mixing is None else Mixing(**mixing)
    if name == Digits.name:
        return Digits(labelled, size, Augmentation() if augment else None, mixed)
    view = View(
        (3, size, size),
        _three(mean, IMAGENET_MEAN),
        _three(std, IMAGENET_STD),
        interpolation,
        crop_pct,
        crop_mode,
    )
    sources = _sources(name, root)
    augmented = dict(augmentation or {}) if augment else None
    return Images(name, sources, view, augmentation=augmented, mixing=mixed, **loading)


def _sources(name: str, root: str | None) -> tuple[Source, Source]:
    if name == FOLDER:
        return open_folder(_root(root))
    if name == SHARDS:
        return open_shards(_root(root))
    return open_named(name, None if root is None else Path(root))


def _root(root: str | None) -> Path:
    if root is None:
        raise DataError("this data set needs root, the folder that holds its training and validation images")
    return Path(root)


def _three(values: Sequence[float] | None, default: tuple[float, float, float]) -> tuple[float, float, float]:
    if values is None:
        return default
    if len(values) != 3:
        raise DataError(f"mean and std are three numbers, one a channel, found {[*values]}")
    red, green, blue = values
    return red, green, blue
