"""How long batches took: the last ones of each size, as percentiles."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

from vmkd_fx.table import table

_KEPT = 1000


@dataclass(frozen=True)
class Latency:
    """Percentiles over batches of one size, in seconds.

    Attributes:
        batch: images in a batch, those that filled it up included.
        runs: batches measured, the last thousand at most.
        p50, p90, p99: half, nine tenths, 99 of a hundred took no longer.
    """

    batch: int
    runs: int
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Latencies:
    """One row a batch size.

    Attributes:
        rows: by batch size, ascending.
        what: what a time includes, in words.
    """

    rows: tuple[Latency, ...]
    what: str

    def __str__(self) -> str:
        header = ("batch", "runs", "p50 ms", "p90 ms", "p99 ms")
        rows = [
            (row.batch, row.runs, *(f"{1000 * value:.3f}" for value in (row.p50, row.p90, row.p99)))
            for row in self.rows
        ]
        return f"{table(header, rows, right=header)}\n{self.what}"


class Recorder:
    """Keeps the last times of each batch size; any thread may add."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._lock = threading.Lock()

    def add(self, batch: int, seconds: float) -> None:
        """One more batch."""
        with self._lock:
            self._times.setdefault(batch, deque(maxlen=_KEPT)).append(seconds)

    def latencies(self, what: str) -> Latencies:
        """What was kept; the first runs of a size, which are slower, are among them."""
        with self._lock:
            kept = {batch: list(times) for batch, times in sorted(self._times.items())}
        rows = (
            Latency(batch, len(times), *map(float, np.percentile(times, (50, 90, 99))))
            for batch, times in kept.items()
        )
        return Latencies(tuple(rows), what)
