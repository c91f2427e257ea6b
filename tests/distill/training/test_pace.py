from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from vmkd_fx.distill.training.pace import Pace, clock, peak_memory

CPU = torch.device("cpu")


def slow(count: int) -> Iterator[int]:
    for item in range(count):
        time.sleep(0.02)
        yield item


def test_waiting_is_a_share_of_the_step() -> None:
    pace = Pace(100, 8, CPU)
    assert pace.figures() == {} and pace.said(0) == ""
    for item, _ in zip(pace.waiting(slow(6)), range(5), strict=False):
        time.sleep(0.02)
        pace.tick()
        assert item < 5
    found = pace.figures()
    # Sleeps may be longer than asked for on a busy machine, both kinds alike.
    assert 0.2 < found["waiting"] < 0.8
    assert found["seconds_per_step"] >= 0.04
    assert found["images_per_second"] == pytest.approx(8 / found["seconds_per_step"])
    assert "images/s" in pace.said(5) and "waiting for images" in pace.said(5)
    pace.restart()
    assert pace.figures() == {}


def test_memory_grows() -> None:
    before = peak_memory(CPU)
    held = torch.ones(30_000_000)
    after = peak_memory(CPU)
    assert before is not None and after is not None
    assert before < after < before + 3 * held.nbytes


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.2, "59 s"), (125, "2:05"), (3725, "1:02:05"), (90000, "25:00:00")]
)
def test_clock(seconds: float, said: str) -> None:
    assert clock(seconds) == said
