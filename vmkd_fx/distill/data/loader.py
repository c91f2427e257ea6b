"""Batches from worker processes, the same ones from any number of them.

A worker is told which samples of which epoch it is to make (`Work`), so that workers live on from epoch to
epoch and an epoch can begin at any batch without the ones before it being loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vmkd_fx.distill.data.bad import Bad
from vmkd_fx.distill.data.protocol import Batch
from vmkd_fx.errors import DataError


class Work(NamedTuple):
    """One batch to make: the samples `keys` of an epoch, the first of which stands at position `first`."""

    seed: int
    epoch: int
    first: int
    keys: list[int]


class Loaded(NamedTuple):
    """A batch, and the images that could not be read for it."""

    batch: Batch
    bad: tuple[Bad, ...]


class _Answering(Dataset[Any]):
    """Hands refusals over as answers: those that are raised in a worker arrive with its traceback in them."""

    def __init__(self, batches: Dataset[Loaded]) -> None:
        self.batches = batches

    def __getitem__(self, work: Work) -> Loaded | DataError:
        try:
            return self.batches[work]
        except DataError as error:
            return error


class _Queue(Sampler[Work]):
    """The works of the run that is next."""

    def __init__(self) -> None:
        self.works: Iterable[Work] = ()

    def __iter__(self) -> Iterator[Work]:
        return iter(self.works)


class Loader:
    """Runs a data set whose items are batches.

    Args:
        batches: gives a `Loaded` for a `Work`, depending on nothing else.
        workers: processes; 0 loads in this one.
        prefetch: batches that each worker is ahead.
        pin_memory: place batches where a GPU can fetch them from.
        keep: let the workers live on between runs.
    """

    def __init__(
        self, batches: Dataset[Loaded], workers: int, prefetch: int, pin_memory: bool, *, keep: bool
    ) -> None:
        self.batches, self.workers, self.prefetch = batches, workers, prefetch
        self.pin_memory, self.keep = pin_memory, keep and workers > 0
        self._queue = _Queue()
        self._kept: DataLoader[Any] | None = None
        self._running = False

    def run(self, works: Iterable[Work]) -> Iterator[Loaded]:
        """What `works` ask for, in their order.

        Raises:
            DataError: as the data set raised it.
        """
        for answer in self._answers(works):
            if isinstance(answer, DataError):
                raise answer
            yield answer

    def _answers(self, works: Iterable[Work]) -> Iterator[Loaded | DataError]:
        if not self.keep or self._running:
            queue = _Queue()
            queue.works = works
            yield from self._loader(queue, keep=False)
            return
        if self._kept is None:
            self._kept = self._loader(self._queue, keep=True)
        self._queue.works, self._running = works, True
        try:
            yield from self._kept
        finally:
            self._running = False

    def _loader(self, queue: _Queue, keep: bool) -> DataLoader[Any]:
        return DataLoader(
            _Answering(self.batches),
            batch_size=None,
            sampler=queue,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            worker_init_fn=_start_worker,
            prefetch_factor=self.prefetch if self.workers else None,
            persistent_workers=keep,
            # Without one of its own it would draw from the global generator that dropout draws from.
            generator=torch.Generator(),
        )


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _start_worker(_: int) -> None:
    # A terminal's Ctrl-C and some schedulers' signals go to the whole process group, and the trainer decides
    # when its workers end. Were they to ignore the signals instead, they would outlive the trainer's exit.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
