"""timm's transforms, and the one formula that turns uint8 images into a model's input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from vmkd_fx.errors import DataError

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class View:
    """How images are seen when nothing is left to chance; timm's terms.

    Attributes:
        input_size: (3, H, W).
        mean, std: one value a channel, for pixels in 0..1.
        interpolation, crop_pct, crop_mode: of the evaluation transform.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) as float32, (x / 255 - mean) / std."""
        # Pillow's pixels lie channel by channel within each pixel: one pass converts and reorders them.
        real = images.to(torch.float32, memory_format=torch.contiguous_format)
        return real.div_(255).sub_(_column(self.mean)).div_(_column(self.std))


@functools.cache
def _column(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


def evaluation_transform(view: View) -> Transform:
    """An image as uint8 (3, H, W), resized and cropped: timm's evaluation transform before it normalises."""
    return _create(
        view,
        {"is_training": False, "crop_pct": view.crop_pct, "crop_mode": view.crop_mode, "normalize": False},
        interpolation=view.interpolation,
    )


def training_transform(view: View, augmentation: Mapping[str, Any] | None) -> Transform:
    """An augmented image as float32 (3, H, W), normalised.

    Args:
        view: image size and normalisation.
        augmentation: keyword arguments of `timm.data.create_transform`, whose defaults hold for what is not
            given; None resizes and crops as for evaluation.

    Raises:
        DataError: timm refuses them.
    """
    if augmentation is None:
        return _Normalised(view, evaluation_transform(view))
    given = dict(augmentation)
    interpolation = given.pop("interpolation", "random")
    erasing = _erasing(given)
    transform = _create(view, {"is_training": True, "normalize": False, **given}, interpolation=interpolation)
    for operation in _operations(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return _Normalised(view, transform, erasing)


def _erasing(options: dict[str, Any]) -> RandomErasing | None:
    """timm's random erasing from the options of `create_transform`, which are taken out of `options`."""
    prob, mode, count = (
        options.pop(name, default)
        for name, default in (("re_prob", 0.0), ("re_mode", "const"), ("re_count", 1))
    )
    if mode not in ("const", "rand", "pixel"):
        raise DataError(f"re_mode is {mode!r}; erased pixels become const, rand or pixel")
    return RandomErasing(prob, mode=mode, max_count=count, device="cpu") if prob else None


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep that many bits of each channel; none leaves black.

    timm's policies ask for as few as none, which Pillow took for black up to version 12 and refuses since.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _operations(transform: Any) -> Iterator[Any]:
    """The operations of timm's policies in a transform: RandAugment, AugMix and AutoAugment."""
    for step in transform.transforms:
        yield from getattr(step, "ops", ())
        for chain in getattr(step, "policy", ()):
            yield from chain


@dataclass(frozen=True)
class _Normalised:
    """A transform to uint8, normalised and erased in part; a class, because workers may be sent it."""

    view: View
    transform: Transform
    erasing: RandomErasing | None = None

    def __call__(self, image: Image.Image) -> Tensor:
        found = self.view.normalise(self.transform(image))
        return found if self.erasing is None else self.erasing(found)


def _create(view: View, options: Mapping[str, Any], interpolation: str) -> Transform:
    try:
        made: Transform = create_transform(
            input_size=view.input_size, mean=view.mean, std=view.std, interpolation=interpolation, **options
        )
    # timm says what it does not like by assertions, look-ups and conversions that fail.
    except Exception as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise DataError(
            f"timm makes no transform from interpolation={interpolation!r}, {given}: {reason}"
        ) from error
    return made
