"""Pieces of work timed in turns, and how sure the ratio of their times is.

Whatever else the machine does for a while then falls on all of them alike. Each turn has them in another
order, so that none always comes behind the same other one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]

RESAMPLES = 2000
MOST = 1000


@dataclass(frozen=True)
class Ratio:
    """Of the medians of two pieces of work.

    Attributes:
        value: the first one's median over the second one's.
        low, high: the bounds of its 95 % interval.
    """

    value: float
    low: float
    high: float


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    turns: int,
    seconds: float = 0.0,
    most: int = MOST,
    seed: int = 0,
    after: Callable[[], object] | None = None,
) -> dict[str, Times]:
    """The seconds of every turn, (turns,), by name. Nothing is warmed up.

    Args:
        calls: the pieces of work; each returns when it is done.
        turns: of each at least.
        seconds: go on for so long, which gives quick work more turns.
        most: turns that end it all the same.
        seed: of the order.
        after: called after every turn, untimed.
    """
    order, names = random.Random(seed), list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    end, done = time.perf_counter() + seconds, 0
    while names and (done < turns or (done < most and time.perf_counter() < end)):
        for name in order.sample(names, len(names)):
            times[name].append(seconds_of(calls[name]))
        done += 1
        if after is not None:
            after()
    return {name: np.array(taken) for name, taken in times.items()}


def seconds_of(call: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def ratio_of(first: Times, second: Times) -> Ratio:
    """The ratio of two medians, and its interval by bootstrap over turns (percentiles, `RESAMPLES` draws).

    Args:
        first, second: seconds; what was measured in one turn stands at one index.
    """
    chosen = np.random.default_rng(0).integers(len(first), size=(RESAMPLES, len(first)))
    drawn = np.median(first[chosen], axis=1) / np.median(second[chosen], axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Ratio(float(np.median(first) / np.median(second)), float(low), float(high))
