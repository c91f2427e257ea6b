"""From an image to the array a model expects, with numpy and pillow alone.

The same pixels as timm's evaluation transform (`timm.data.create_transform(..., is_training=False)`): resize,
centre crop, scale to 0..1, subtract the mean, divide by the standard deviation.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmkd_fx.errors import DataError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
CROP_MODES = ("center", "squash", "border")
_LARGEST_SIDE = 8192


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a model's input; the keys of `timm.data.resolve_data_config`.

    Attributes:
        input_size: (C, H, W) of the model; C is 1 (greyscale) or 3 (RGB).
        mean, std: one value a channel, for pixels in 0..1.
        interpolation: one of `INTERPOLATIONS`.
        crop_pct: the part of the resized image that the crop keeps.
        crop_mode: "center" resizes the shorter side, "squash" both sides, "border" the longer side (and fills
            the rest with the mean colour); all three then cut or pad around the centre.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name in ("input_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        fault = _fault(self)
        if fault:
            raise DataError(f"preprocessing: {fault}")

    def __call__(self, image: Image.Image | str | os.PathLike[str]) -> NDArray[np.float32]:
        """One image, or the path of one, as float32 (C, H, W).

        Raises:
            DataError: the file is missing or holds no image that pillow can read.
        """
        return self.normalise(self.pixels(image)[None])[0]

    def pixels(self, image: Image.Image | str | os.PathLike[str]) -> NDArray[np.uint8]:
        """One image, or the path of one, resized and cropped: uint8 (H, W, C).

        Raises:
            DataError: as in a call.
        """
        if not isinstance(image, Image.Image):
            image = _open(Path(image))
        image = image.convert("L" if self.input_size[0] == 1 else "RGB")
        pixels = np.asarray(self._crop(self._resize(image)), dtype=np.uint8)
        return pixels.reshape(*self.input_size[1:], -1)

    def normalise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images of exactly the input size, uint8 (B, H, W, C), as float32 (B, C, H, W).

        Raises:
            DataError: another type or shape.
        """
        channels, height, width = self.input_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (height, width, channels):
            raise DataError(
                f"found {images.dtype} {images.shape}, expected uint8 (B, {height}, {width}, {channels}); "
                "images of another size go in as paths or PIL images and are resized"
            )
        scaled = images.astype(np.float32) / np.float32(255)
        scaled = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def _resize(self, image: Image.Image) -> Image.Image:
        scale_h, scale_w = (math.floor(side / self.crop_pct) for side in self.input_size[1:])
        width, height = image.size
        if self.crop_mode == "squash":
            size = (scale_w, scale_h)
        elif self.crop_mode == "center" and scale_h == scale_w:
            # timm and torchvision truncate the longer side here and round it in every other case.
            shorter = min(width, height)
            size = (int(scale_w * width / shorter), int(scale_h * height / shorter))
        else:
            choose = min if self.crop_mode == "center" else max
            ratio = choose(height / scale_h, width / scale_w)
            size = (round(width / ratio), round(height / ratio))
        if min(size) < 1:
            raise DataError(f"an image of {width} x {height} pixels is too thin to resize")
        return image if size == image.size else image.resize(size, INTERPOLATIONS[self.interpolation])

    def _crop(self, image: Image.Image) -> Image.Image:
        height, width = self.input_size[1:]
        fill: tuple[int, ...] = tuple(round(255 * value) for value in self.mean)
        if self.crop_mode != "border":
            fill = (0,) * len(self.mean)
        canvas = Image.new(image.mode, (width, height), fill if len(fill) > 1 else fill[0])
        canvas.paste(image, (_offset(width, image.width), _offset(height, image.height)))
        return canvas


def _offset(room: int, length: int) -> int:
    """Where an edge of `length` starts on a canvas of `room`, centred; negative when it is cut."""
    return (room - length) // 2 if length < room else -round((length - room) / 2)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise DataError(f"there is no image {path}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} holds no image that can be read: {error}") from error


def _fault(p: Preprocess) -> str | None:
    """What is wrong with the values of `p`, or None."""
    size = p.input_size
    if len(size) != 3 or not all(type(side) is int and 1 <= side <= _LARGEST_SIDE for side in size):
        return f"input_size must be three whole numbers (C, H, W) in 1..{_LARGEST_SIDE}, found {size}"
    if size[0] not in (1, 3):
        return f"images have 1 (greyscale) or 3 (RGB) channels, input_size asks for {size[0]}"
    for name, values in (("mean", p.mean), ("std", p.std)):
        if len(values) != size[0] or not all(_finite(value) for value in values):
            return f"{name} must be {size[0]} finite numbers, one a channel, found {values}"
    if not all(value > 0 for value in p.std):
        return f"std must be positive, found {p.std}"
    if not _finite(p.crop_pct) or not 0 < p.crop_pct <= 16:
        return f"crop_pct must be a number above 0 and at most 16, found {p.crop_pct}"
    if p.interpolation not in INTERPOLATIONS:
        return f"interpolation {p.interpolation!r} is not one of {', '.join(INTERPOLATIONS)}"
    if p.crop_mode not in CROP_MODES:
        return f"crop_mode {p.crop_mode!r} is not one of {', '.join(CROP_MODES)}"
    return None


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
