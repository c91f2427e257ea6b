"""How fast a training goes, how long it will take, and how much of it is waiting for images."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_SMOOTHING = 0.95


class Pace:
    """Counts steps, images and seconds from the start of an epoch.

    Args:
        steps: how many there will be in all.
        batch_size: images a step, of all processes.
        device: that of this process.
    """

    def __init__(self, steps: int, batch_size: int, device: torch.device) -> None:
        self.steps, self.batch_size, self.device = steps, batch_size, device
        self.seconds_per_step: float | None = None
        self.restart()

    def restart(self) -> None:
        """Count from here."""
        self._done, self._waited, self._trained = 0, 0.0, 0.0
        self._last = time.perf_counter()

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each of them is there counts as waiting."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield batch

    def tick(self) -> None:
        """A step is done."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        self._done += 1
        self._trained += took
        before = took if self.seconds_per_step is None else self.seconds_per_step
        self.seconds_per_step = _SMOOTHING * before + (1 - _SMOOTHING) * took

    def figures(self) -> dict[str, Any]:
        """Images and seconds a step, the share of the time that went into waiting for images, and the largest
        memory so far in bytes (of a GPU its tensors, else the process's); empty before a step.
        """
        if not self._done or self._trained <= 0:
            return {}
        return {
            "images_per_second": self._done * self.batch_size / self._trained,
            "seconds_per_step": self._trained / self._done,
            "waiting": self._waited / self._trained,
            "peak_memory": peak_memory(self.device),
        }

    def said(self, step: int) -> str:
        """In words: the rate, the time left behind `step`, and the waiting."""
        if self.seconds_per_step is None or not (found := self.figures()):
            return ""
        left = clock(self.seconds_per_step * (self.steps - step))
        rate = self.batch_size / self.seconds_per_step
        return f"{rate:.0f} images/s, {left} left, {100 * found['waiting']:.0f} % waiting for images"


def clock(seconds: float) -> str:
    """Seconds as 3 s, 2:05 or 1:02:05."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use at once: of tensors on a GPU, else of this process; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    kilobytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes
