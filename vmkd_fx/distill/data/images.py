"""Images of any source as a data set to train on: augmented by timm, mixed in pairs, loaded by workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from vmkd_fx.distill.data.bad import Bad, BadImages, Source, read_nearest, try_read
from vmkd_fx.distill.data.keyed import kept_generators, seed_generators
from vmkd_fx.distill.data.loader import Loaded, Loader, Work
from vmkd_fx.distill.data.mixing import Mixing
from vmkd_fx.distill.data.order import epoch_order, evenly, train_slices, validation_slices
from vmkd_fx.distill.data.protocol import Batch
from vmkd_fx.distill.data.transforms import View, evaluation_transform, training_transform
from vmkd_fx.errors import DataError


class TrainingBatches(Dataset[Loaded]):
    """Training batches, each from its `Work` alone."""

    def __init__(
        self,
        source: Source,
        view: View,
        augmentation: Mapping[str, Any] | None,
        mixing: Mixing | None,
        most: int,
    ) -> None:
        self.source, self.view, self.augmentation, self.mixing = source, view, augmentation, mixing
        self.most = most
        self.transform = training_transform(view, augmentation)

    def __getitem__(self, work: Work) -> Loaded:
        images = _room(len(work.keys), self.view.input_size)
        targets = torch.empty(len(work.keys), dtype=torch.int64)
        bad: list[Bad] = []
        with kept_generators():
            for place, key in enumerate(work.keys):
                images[place], target, passed = self.one(work.seed, work.epoch, key)
                targets[place] = target
                bad += passed
        if self.mixing is not None and self.mixing.active(work.epoch):
            where = {"first": work.first, "seed": work.seed, "epoch": work.epoch}
            images, targets = self.mixing.mix(images, targets, **where, classes=len(self.source.classes))
        return Loaded(Batch(images, targets, torch.tensor(work.keys)), tuple(bad))

    def one(self, seed: int, epoch: int, key: int) -> tuple[Tensor, int, list[Bad]]:
        """A sample before it is mixed, its class, and the bad images passed over; draws global numbers."""
        image, target, bad = read_nearest(self.source, key % len(self.source), self.most)
        seed_generators(seed, epoch, key)
        try:
            return self.transform(image), target, bad
        # The transform is timm's and Pillow's together; how it fails depends on their versions.
        except Exception as error:
            name = self.source.describe(key % len(self.source))
            raise DataError(
                f"image {name} cannot be augmented (seed {seed}, epoch {epoch}, sample {key}): "
                f"{type(error).__name__}: {error}"
            ) from error


class ValidationBatches(Dataset[Loaded]):
    """Held-out images in batches, normalised; those that cannot be read are left out."""

    def __init__(self, source: Source, view: View) -> None:
        self.source, self.view = source, view
        self.transform = evaluation_transform(view)

    def __getitem__(self, work: Work) -> Loaded:
        pixels, batch, bad = self.pixels(work.keys)
        return Loaded(Batch(self.view.normalise(pixels), *batch), bad)

    def pixels(self, indices: list[int]) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Bad, ...]]:
        """uint8 images (B, 3, H, W), their targets and numbers (B,), and the bad ones among `indices`."""
        pixels = torch.empty((len(indices), *self.view.input_size), dtype=torch.uint8)
        good: list[tuple[int, int]] = []
        bad: list[Bad] = []
        for index in indices:
            found = try_read(self.source, index, self.transform)
            if isinstance(found, Bad):
                bad.append(found)
            else:
                pixels[len(good)], target = found
                good.append((target, index))
        targets, numbers = torch.tensor(good, dtype=torch.int64).view(-1, 2).unbind(1)
        return pixels[: len(good)], (targets, numbers), tuple(bad)


class Images:
    """Images of two sources, one to train and one to judge on.

    Args:
        name: of the data set.
        sources: training and validation images; both know the same classes.
        view: image size, normalisation and evaluation transform.
        augmentation: keyword arguments of `timm.data.create_transform`; None trains on the images as they
            are, resized and cropped as for evaluation.
        mixing: how pairs are mixed; None: not at all.
        repeats: how often an image comes in an epoch, augmented anew each time (repeated augmentation, Hoffer
            et al. 2020); an epoch stays as long as it is and has fewer different images.
        workers: processes that load; 0 loads in this one.
        prefetch: batches that each worker is ahead.
        pin_memory: None where CUDA is.
        max_bad: share of the images of a source that may be unreadable.

    Raises:
        DataError: timm makes no such transforms, or the sources know other classes.
    """

    def __init__(
        self,
        name: str,
        sources: tuple[Source, Source],
        view: View,
        *,
        augmentation: Mapping[str, Any] | None = None,
        mixing: Mixing | None = None,
        repeats: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool | None = None,
        max_bad: float = 0.01,
    ) -> None:
        train, held_out = sources
        if held_out.classes != train.classes:
            raise DataError(
                f"{name}: the {len(train.classes)} classes of the training images and the "
                f"{len(held_out.classes)} of the validation images are not the same"
            )
        self.name, self.labels = name, train.classes
        self.input_size, self.mean, self.std = view.input_size, view.mean, view.std
        self.interpolation, self.crop_pct, self.crop_mode = view.interpolation, view.crop_pct, view.crop_mode
        self.repeats = repeats
        self._bad = BadImages("training", len(train), max_bad)
        self._bad_held_out = BadImages("validation", len(held_out), max_bad)
        self._train = TrainingBatches(train, view, augmentation, mixing, self._bad.most)
        self._validation = ValidationBatches(held_out, view)
        pinned = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._training_loader = Loader(self._train, workers, prefetch, pinned, keep=True)
        self._validation_loader = Loader(self._validation, workers, prefetch, pinned, keep=False)

    def __len__(self) -> int:
        return len(self._train.source)

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    @property
    def num_held_out(self) -> int:
        return len(self._validation.source)

    @property
    def bad_images(self) -> tuple[Bad, ...]:
        """The training and validation images that could not be read so far, in this process."""
        return (*self._bad.found.values(), *self._bad_held_out.found.values())

    def sample(self, index: int, epoch: int, seed: int = 0) -> tuple[Tensor, int]:
        """See `ImageData.sample`."""
        with kept_generators():
            image, target, bad = self._train.one(seed, epoch, index)
        self._bad.note(bad)
        return image, target

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
        order = epoch_order(len(self), seed, epoch, self.repeats)
        parts = train_slices(len(self), batch_size, start_batch, rank, world_size)
        works = (Work(seed, epoch, part.start, order[part].tolist()) for part in parts)
        for loaded in self._training_loader.run(works):
            self._bad.note(loaded.bad)
            yield loaded.batch

    def validation_batches(
        self, batch_size: int = 256, *, rank: int = 0, world_size: int = 1, count: int | None = None
    ) -> Iterator[Batch]:
        """See `ImageData.validation_batches`; images that cannot be read are left out."""
        chosen = evenly(self.num_held_out, count)
        parts = validation_slices(len(chosen), batch_size, rank, world_size)
        works = (Work(0, 0, part.start, chosen[part].tolist()) for part in parts)
        for loaded in self._validation_loader.run(works):
            self._bad_held_out.note(loaded.bad)
            if len(loaded.batch.targets):
                yield loaded.batch

    def held_out(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """See `ImageData.held_out`."""
        pixels, (targets, _), bad = self._validation.pixels(list(range(self.num_held_out)))
        self._bad_held_out.note(bad)
        return pixels.permute(0, 2, 3, 1).contiguous().numpy(), targets.numpy()


def _room(count: int, size: tuple[int, int, int]) -> Tensor:
    """Space for a batch of images; in a worker, where the training process can see it without a copy."""
    room = torch.empty((count, *size))
    return room if get_worker_info() is None else room.share_memory_()
