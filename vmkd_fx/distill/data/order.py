"""Which images come when: a pure function of (seed, epoch), shared out to processes.

Position p of an epoch holds image `order[p]`; batch b is the positions b * B to (b + 1) * B; process r of W
takes the r-th of W equal stretches of every batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmkd_fx.errors import DataError


def batches_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in one epoch; fewer images than one batch are one smaller batch."""
    return max(1, images // batch_size)


def generator(seed: int, epoch: int) -> torch.Generator:
    """Random numbers of an epoch."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def permutation(images: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: each of `images` once, (images,) in int64."""
    return torch.randperm(images, generator=generator(seed, epoch))


def epoch_order(images: int, seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """The sample at each position of an epoch, (images,) in int64, no sample twice.

    Sample k is image k % images; with `repeats` above 1 an image comes that often, as samples `index`,
    `index + images`, ..., near each other but never as neighbours that are mixed: a b a' b' a" b" c d ...
    """
    order = permutation(images, seed, epoch)
    if repeats == 1:
        return order
    position = torch.arange(images)
    pair, within = position // (2 * repeats), position % (2 * repeats)
    return order[pair * 2 + within % 2] + images * (within // 2)


def train_slices(
    images: int,
    batch_size: int,
    start_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[slice]:
    """The positions that process `rank` trains on, batch by batch from `start_batch` on.

    Raises:
        DataError: the processes cannot get equal parts of a batch.
    """
    size = min(images, batch_size)
    if size % world_size:
        reason = f"; the data set has {images} images" if size < batch_size else ""
        raise DataError(
            f"a batch of {size} images cannot be shared out evenly to {world_size} processes{reason}: "
            f"choose a batch_size that is a multiple of {world_size} and at most {images}"
        )
    part = size // world_size
    for batch in range(start_batch, batches_per_epoch(images, batch_size)):
        start = batch * size + rank * part
        yield slice(start, start + part)


def evenly(images: int, count: int | None) -> NDArray[np.int64]:
    """`count` of the positions 0 to `images` - 1, ascending and evenly spaced; all of them where that is no
    fewer, and for None.
    """
    chosen = min(count or images, images)
    return np.arange(chosen, dtype=np.int64) * images // chosen


def validation_slices(images: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[slice]:
    """The positions that process `rank` judges, in batches of nearly equal size, at most `batch_size` each.

    Every process gets the same number of batches, so that those that talk to each other within a forward
    wait for nobody; only with fewer images than batches does one get fewer.
    """
    first, last = (images * place // world_size for place in (rank, rank + 1))
    largest = -(-images // world_size)
    count = -(-largest // batch_size)
    edges = [first + (last - first) * place // count for place in range(count + 1)]
    for start, stop in pairwise(edges):
        if start < stop:
            yield slice(start, stop)
