"""The images of an epoch in the order of training, as the shards of a cache ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

from vmkd_fx.distill.cache.folder import CacheFolder
from vmkd_fx.distill.data import Batch, ImageData


def shards_of(
    data: ImageData, seed: int, folder: CacheFolder, work: Iterable[tuple[int, int]], batch_size: int
) -> Iterator[tuple[int, int, Iterator[Batch]]]:
    """Each (epoch, shard) of `work` with the batches that fill it, which have to be taken before the next.

    Neighbouring shards come from one run of the loader. Batches are of the largest power of two up to
    `batch_size`.
    """
    largest = min(1 << (batch_size.bit_length() - 1), folder.manifest.rows)
    for epoch, shards in _runs(work):
        first, last = folder.span(shards[0]).start, folder.span(shards[-1]).stop
        stream = _stream(data, seed, epoch, first, last, largest)
        for shard in shards:
            yield epoch, shard, _part(stream, len(folder.span(shard)))


def _runs(work: Iterable[tuple[int, int]]) -> Iterator[tuple[int, range]]:
    """Neighbouring shards of one epoch, so that the images are loaded in one go."""
    run: tuple[int, range] | None = None
    for epoch, shard in work:
        if run is not None and run[0] == epoch and run[1].stop == shard:
            run = epoch, range(run[1].start, shard + 1)
            continue
        if run is not None:
            yield run
        run = epoch, range(shard, shard + 1)
    if run is not None:
        yield run


def _part(stream: Iterator[Batch], images: int) -> Iterator[Batch]:
    seen = 0
    while seen < images:
        batch = next(stream)
        seen += len(batch.indices)
        yield batch


def _stream(data: ImageData, seed: int, epoch: int, start: int, end: int, largest: int) -> Iterator[Batch]:
    """The images at the places `start` to `end` of an epoch: batches of `largest`, then smaller ones to the
    last image, which no batch of a training need reach but one of some batch size does.
    """
    size = largest
    while start < end:
        while size > end - start:
            size //= 2
        batches: Any = data.train_batches(epoch, start // size, batch_size=size, seed=seed)
        with closing(batches):
            for batch in batches:
                start += size
                yield batch
                if start + size > end:
                    break
