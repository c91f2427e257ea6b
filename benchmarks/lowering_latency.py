"""Two pieces of work timed in turns, and how sure the ratio of their medians is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vmkd_fx.timing import in_turns, ratio_of

WARM_UP = 5


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
    """Time both after a warm-up, pair after pair, each in random order.

    Args:
        runs: pairs, at least.
        seconds: go on for so long, which gives quick work more pairs.
    """
    for _ in range(WARM_UP):
        ours()
        theirs()
    times = in_turns({"ours": ours, "theirs": theirs}, turns=runs, seconds=seconds)
    return compare(np.stack([times["ours"], times["theirs"]], axis=1))


def compare(times: np.ndarray) -> Latency:
    """Medians, and the interval of their ratio.

    Args:
        times: (runs, 2), seconds; ours in the first column, and what was measured in one turn in one row.
    """
    ratio = ratio_of(times[:, 0], times[:, 1])
    ours, theirs = np.median(times, axis=0)
    return Latency(float(ours), float(theirs), ratio.value, ratio.low, ratio.high, len(times))
