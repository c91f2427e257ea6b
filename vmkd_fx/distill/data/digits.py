"""The digits that scikit-learn ships: a data set that is always there.

Augmentation acts between the division by 255 and the normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vmkd_fx.distill.data.bad import Bad
from vmkd_fx.distill.data.mixing import Mixing
from vmkd_fx.distill.data.order import evenly, generator, train_slices, validation_slices
from vmkd_fx.distill.data.protocol import Batch
from vmkd_fx.errors import DataError
from vmkd_fx.extras import require

# Of the digits outside the held-out set, at 32 x 32, rounded.
DIGITS_MEAN = 0.305
DIGITS_STD = 0.324

_HELD_OUT = 797
_PIXEL_MAX = 16


@dataclass(frozen=True)
class Augmentation:
    """How far an image is moved at random; every range is symmetric and drawn uniformly.

    Attributes:
        rotation: degrees.
        zoom: fraction of the size.
        shift: fraction of the image's side, along x and y.
        contrast: fraction of the brightness.
    """

    rotation: float = 12.0
    zoom: float = 0.1
    shift: float = 0.08
    contrast: float = 0.2

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Affine maps (count, 2, 3) from output to input coordinates in [-1, 1], and contrasts (count,)."""
        angle, zoom, shift_x, shift_y, contrast = (torch.rand(count, 5, generator=generator) * 2 - 1).unbind(
            1
        )
        angle = torch.deg2rad(angle * self.rotation)
        scale = 1 + zoom * self.zoom
        cos, sin = scale * angle.cos(), scale * angle.sin()
        # The coordinates span 2, so a shift by a fraction of the side is twice that fraction.
        rows = [cos, -sin, shift_x * self.shift * 2, sin, cos, shift_y * self.shift * 2]
        return torch.stack(rows, 1).view(count, 2, 3), 1 + contrast * self.contrast


def warp(images: Tensor, affine: Tensor, contrast: Tensor) -> Tensor:
    """Move `images` (B, C, H, W) in [0, 1] by `affine` (B, 2, 3), times `contrast` (B,); outside is black.

    An image's result does not depend on its place in the batch: the grid is written out in elementwise sums,
    because a batched matrix product may round differently for another batch size.
    """
    height, width = images.shape[-2:]
    x = (torch.arange(width, dtype=torch.float32) * 2 + 1) / width - 1
    y = (torch.arange(height, dtype=torch.float32) * 2 + 1) / height - 1
    rows = affine[:, :, :, None, None]
    grid = rows[:, :, 0] * x + rows[:, :, 1] * y[:, None] + rows[:, :, 2]
    moved = F.grid_sample(images, grid.permute(0, 2, 3, 1), mode="bilinear", align_corners=False)
    return (moved * contrast[:, None, None, None]).clamp(0, 1)


class Digits:
    """The 1797 handwritten digits that scikit-learn ships, grey, enlarged from 8 x 8 once.

    The split is fixed: 797 held-out images, the same for every `labelled`; the training images are the first
    `labelled` of the other 1000, in an order in which the ten classes take turns.

    Args:
        labelled: training images, 10 to 1000.
        image_size: height and width in pixels, at least 8.
        augmentation: None trains on the images as they are.
        mixing: how pairs are mixed; None: not at all.

    Raises:
        DataError: `labelled` or `image_size` outside its range.
        MissingExtraError: scikit-learn is not installed.
    """

    name = "digits"
    labels = tuple("0123456789")
    mean = (DIGITS_MEAN,) * 3
    std = (DIGITS_STD,) * 3
    # The images have the model's size: nothing is cut, and nothing is resized.
    interpolation, crop_pct, crop_mode = "bicubic", 1.0, "center"
    bad_images: tuple[Bad, ...] = ()

    def __init__(
        self,
        labelled: int = 200,
        image_size: int = 32,
        augmentation: Augmentation | None = Augmentation(),
        mixing: Mixing | None = None,
    ) -> None:
        if image_size < 8:
            raise DataError(f"image_size is {image_size}; the digits are 8 x 8 and are enlarged: 8 or more")
        pixels, targets = _load_digits()
        most = len(targets) - _HELD_OUT
        if not len(self.labels) <= labelled <= most:
            raise DataError(
                f"{labelled} labelled digits were asked for; 10 (one a class) to {most} can be had, "
                f"the other {_HELD_OUT} of {len(targets)} are held out for judging"
            )
        order = _turns(targets)
        images = _enlarge(pixels, image_size)
        train, held_out = order[_HELD_OUT : _HELD_OUT + labelled], order[:_HELD_OUT]
        self.input_size = (3, image_size, image_size)
        self.augmentation, self.mixing = augmentation, mixing
        self._images, self._targets = images[train], torch.from_numpy(targets[train])
        self._held_out, self._held_out_targets = (
            images[held_out],
            torch.from_numpy(targets[held_out]),
        )

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    @property
    def num_held_out(self) -> int:
        return len(self._held_out_targets)

    def sample(self, index: int, epoch: int, seed: int = 0) -> tuple[Tensor, int]:
        """See `ImageData.sample`."""
        _, moves = self._epoch(seed, epoch)
        return self._images_of(torch.tensor([index]), moves)[0], int(self._targets[index])

    def train_batches(
        self,
        epoch: int,
        start_batch: int = 0,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """See `ImageData.train_batches`."""
        order, moves = self._epoch(seed, epoch)
        for positions in train_slices(len(self), batch_size, start_batch, rank, world_size):
            index = order[positions]
            images, targets = self._images_of(index, moves), self._targets[index]
            if self.mixing is not None and self.mixing.active(epoch):
                where = {"first": positions.start, "seed": seed, "epoch": epoch}
                images, targets = self.mixing.mix(images, targets, **where, classes=self.num_classes)
            yield Batch(images, targets, index)

    def validation_batches(
        self, batch_size: int = 256, *, rank: int = 0, world_size: int = 1, count: int | None = None
    ) -> Iterator[Batch]:
        """See `ImageData.validation_batches`."""
        chosen = torch.from_numpy(evenly(self.num_held_out, count))
        for part in validation_slices(len(chosen), batch_size, rank, world_size):
            index = chosen[part]
            yield Batch(self._normalise(_unit(self._held_out[index])), self._held_out_targets[index], index)

    def _epoch(self, seed: int, epoch: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The order of an epoch, and where each image is moved in it."""
        random = generator(seed, epoch)
        order = torch.randperm(len(self), generator=random)
        return order, self.augmentation.draw(len(self), random) if self.augmentation else None

    def _images_of(self, index: Tensor, moves: tuple[Tensor, Tensor] | None) -> Tensor:
        images = _unit(self._images[index])
        if moves is not None:
            images = warp(images, *(table[index] for table in moves))
        return self._normalise(images)

    def held_out(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """See `ImageData.held_out`."""
        return self._held_out[..., None].repeat(1, 1, 1, 3).numpy(), self._held_out_targets.numpy().copy()

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (self.mean, self.std))
        return (images - mean) / std


def _load_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    digits = require("sklearn.datasets", extra="train", purpose="the digits data set").load_digits()
    return digits.images, digits.target.astype(np.int64)


def _turns(targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """A fixed random order of all images in which the classes take turns, so every stretch is stratified."""
    # RandomState, because numpy promises that its stream never changes.
    shuffled = np.random.RandomState(0).permutation(len(targets))
    labels = targets[shuffled]
    turn = np.empty_like(labels)
    for label in np.unique(labels):
        members = labels == label
        turn[members] = np.arange(members.sum())
    return shuffled[np.lexsort((labels, turn))]


def _enlarge(pixels: NDArray[np.float64], size: int) -> Tensor:
    """Grey images (N, 8, 8) in 0..16 to uint8 (N, size, size)."""
    images = torch.from_numpy(pixels).float()[:, None] * (255 / _PIXEL_MAX)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return images[:, 0].round().to(torch.uint8)


def _unit(images: Tensor) -> Tensor:
    """uint8 (B, H, W) to float32 (B, 1, H, W) in [0, 1]."""
    return images[:, None].float() / 255
