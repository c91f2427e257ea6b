"""What the trainer asks of images, whoever holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vmkd_fx.distill.data.bad import Bad


class Batch(NamedTuple):
    """The images of one step, of one process.

    Attributes:
        images: (B, 3, H, W) in float32, normalised.
        targets: classes (B,) in int64, or where images are mixed their shares (B, classes) in float32.
        indices: (B,) in int64, which samples these are. With (seed, epoch) they decide the images: a sample
            comes at most once in an epoch.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor


class ImageData(Protocol):
    """A data set; `len` is the number of training images in an epoch.

    Attributes:
        name: of the data set.
        labels: names of the classes, in the order of the logits.
        input_size: (3, H, W).
        mean, std: normalisation of the images, one value a channel, for pixels in 0..1.
        interpolation, crop_pct, crop_mode: of the evaluation transform, in timm's terms.
        bad_images: those that this process could not read so far.
    """

    name: str
    labels: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @property
    def bad_images(self) -> tuple[Bad, ...]: ...

    def __len__(self) -> int: ...

    @property
    def num_classes(self) -> int: ...

    def sample(self, index: int, epoch: int, seed: int = 0) -> tuple[Tensor, int]:
        """One training image (3, H, W), augmented as in that epoch but not mixed, and its class."""
        ...

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
        """Shuffled, augmented batches of one epoch from batch `start_batch` on: `batches_per_epoch` in all.

        `batch_size` images are shared out to `world_size` processes: each of them gets one contiguous part of
        every batch, and all parts joined are the batch that one process would get.

        Raises:
            DataError: a batch cannot be shared out evenly.
        """
        ...

    @property
    def num_held_out(self) -> int:
        """How many images are held out for judging."""
        ...

    def validation_batches(
        self, batch_size: int = 256, *, rank: int = 0, world_size: int = 1, count: int | None = None
    ) -> Iterator[Batch]:
        """The held-out images in their fixed order, not augmented; process `rank` gets its contiguous part.
        `count` of them, evenly spaced, where all are too many.

        Batches have at most `batch_size` images, and every process gets the same number of them where there
        are images enough.
        """
        ...

    def held_out(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Held-out images (B, H, W, 3) as uint8, in the order of `validation_batches`, and targets (B,)."""
        ...
