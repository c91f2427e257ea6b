"""Images that ranges are measured on: the same few from the same folder, always."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.deploy.inputs import ImageSource, model_input
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.errors import DataError
from vmkd_fx.frames import Frames

MOST = 128
"""More images move a measured range little and cost time and memory."""

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def calibration_images(
    source: str | os.PathLike[str] | NDArray[Any] | Sequence[ImageSource],
    preprocess: Preprocess,
    frames: Frames | None = None,
    *,
    most: int = MOST,
    purpose: str = "calibration",
) -> NDArray[Any]:
    """At most `most` images as the graph takes them, evenly taken from `source`.

    Args:
        source: a folder of pictures, with folders in it; or pictures, or an array, as `Runner` takes them.
        preprocess: how a picture becomes the input.
        frames: what the graph takes instead of normalised images.
        purpose: what they are for, for messages.

    Raises:
        DataError: no such folder, no pictures in it, one that cannot be read, or an array of another shape or
            with numbers that are not finite.
    """
    if isinstance(source, (str, os.PathLike)):
        source = pictures(Path(source), purpose)
    if len(source) == 0:
        raise DataError(f"there are no {purpose} images")
    chosen = [round(i * len(source) / min(most, len(source))) for i in range(min(most, len(source)))]
    if isinstance(source, np.ndarray):
        images = model_input(source[chosen], preprocess, frames)
        if not np.isfinite(images).all():
            raise DataError(f"{purpose} images hold numbers that are not finite")
        return images
    return model_input([source[i] for i in chosen], preprocess, frames)


def pictures(folder: Path, purpose: str = "calibration") -> list[Path]:
    """The pictures in a folder and the folders in it, by their names in order.

    Raises:
        DataError: there is no such folder, or there are none in it.
    """
    if not folder.is_dir():
        raise DataError(f"{purpose} images: there is no folder {folder}")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file()]
    if not found:
        raise DataError(f"{purpose} images: {folder} holds no pictures ({', '.join(PICTURES)})")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())
