"""Two pieces of work timed in turns, and how sure the ratio of their medians is."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WARM_UP = 5
RESAMPLES = 2000
MOST = 1000


@dataclass(frozen=True)
class Latency:
    """What two pieces of work took.

    Attributes:
        ours, theirs: medians, in seconds.
        ratio: of the medians, ours over theirs.
        low, high: the bounds of its 95 % interval.
        runs: of each.
    """

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    runs: int


def interleaved(
    ours: Callable[[], object], theirs: Callable[[], object], runs: int, seconds: float = 0.0
) -> Latency:
    """Time both after a warm-up, one pair after the other and each pair in random order: what disturbs the
    machine for a while then meets both.

    Args:
        runs: pairs, at least.
        seconds: go on for so long, which gives quick work more pairs; `MOST` ends it.
    """
    work, order = (ours, theirs), random.Random(0)
    for _ in range(WARM_UP):
        ours()
        theirs()
    times: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(times) < runs or (len(times) < MOST and time.perf_counter() < end):
        pair = [0.0, 0.0]
        for side in order.sample((0, 1), 2):
            started = time.perf_counter()
            work[side]()
            pair[side] = time.perf_counter() - started
        times.append(pair)
    return compare(np.array(times))


def compare(times: np.ndarray) -> Latency:
    """Medians, and the interval by bootstrap over pairs.

    Args:
        times: (runs, 2), seconds; ours in the first column, and what was measured in one turn in one row.
    """
    chosen = np.random.default_rng(0).integers(len(times), size=(RESAMPLES, len(times)))
    medians = np.median(times[chosen], axis=1)
    low, high = np.quantile(medians[:, 0] / medians[:, 1], (0.025, 0.975))
    ours, theirs = np.median(times, axis=0)
    return Latency(float(ours), float(theirs), float(ours / theirs), float(low), float(high), len(times))
