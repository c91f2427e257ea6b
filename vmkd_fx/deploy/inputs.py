"""What a bundle's graph takes, made of what a user has: pictures, bytes or normalised images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.errors import DataError
from vmkd_fx.frames import Frames

ImageSource: TypeAlias = "Image.Image | str | os.PathLike[str]"


def model_input(
    images: NDArray[Any] | Sequence[ImageSource], preprocess: Preprocess, frames: Frames | None
) -> NDArray[Any]:
    """The graph's input: float32 (B, C, H, W), normalised; with frames uint8 in their layout.

    Args:
        images: paths and PIL images of any size; or uint8 (B, H, W, C) of exactly the input size; or what the
            graph itself takes.
        frames: what the graph takes instead of normalised images.

    Raises:
        DataError: another type or shape, or a path that holds no image.
    """
    if not isinstance(images, np.ndarray):
        images = np.stack([preprocess.pixels(image) for image in images])
    channels, height, width = preprocess.input_size
    if images.dtype == np.uint8 and frames is None:
        return preprocess.normalise(images)
    if images.dtype == np.uint8 and frames is not None:
        if images.shape[1:] == frames.shape(preprocess.input_size):
            return images
        if images.shape[1:] == (height, width, channels):
            return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    elif frames is None and images.dtype == np.float32 and images.shape[1:] == preprocess.input_size:
        return images
    taken = f"uint8 (B, {height}, {width}, {channels})"
    if frames is None:
        taken = f"float32 (B, {channels}, {height}, {width}), normalised, or {taken}"
    elif frames.layout == "nchw":
        taken = f"uint8 (B, {channels}, {height}, {width}) or (B, {height}, {width}, {channels})"
    raise DataError(
        f"found {images.dtype} images of shape {images.shape}; expected {taken}, "
        "or a list of paths or PIL images"
    )
