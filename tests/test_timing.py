"""Turns and ratios."""

from __future__ import annotations

import time

import numpy as np
import pytest

from vmkd_fx.timing import in_turns, ratio_of, seconds_of


def test_every_turn_has_each_once_in_random_order() -> None:
    seen: list[str] = []
    turns: list[None] = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times = in_turns(calls, turns=40, after=lambda: turns.append(None))
    rounds = ["".join(seen[at : at + 3]) for at in range(0, len(seen), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6
    assert {name: len(taken) for name, taken in times.items()} == {"a": 40, "b": 40, "c": 40}
    assert len(turns) == 40


def test_it_goes_on_for_the_time_asked_and_ends_at_the_most() -> None:
    quick = {"a": lambda: None}
    assert len(in_turns(quick, turns=1, seconds=0.05)["a"]) > 1
    assert len(in_turns(quick, turns=1, seconds=60, most=7)["a"]) == 7
    assert in_turns({}, turns=5) == {}


def test_what_takes_longer_is_told_from_what_does_not() -> None:
    random = np.random.default_rng(1)
    disturbed = 0.01 * (1 + random.exponential(0.2, size=80))
    first, second = (disturbed * (1 + 0.02 * random.standard_normal(80)) for _ in range(2))
    same, slower = ratio_of(first, second), ratio_of(1.1 * first, second)
    assert same.low < 1 < same.high
    assert slower.low > 1.03
    assert slower.value == pytest.approx(1.1 * same.value)
    assert ratio_of(second, first).value == pytest.approx(1 / same.value)


def test_seconds() -> None:
    assert 0.02 <= seconds_of(lambda: time.sleep(0.02)) < 2
