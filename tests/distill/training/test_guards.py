from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vmkd_fx.distill.data import Batch
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.training.guards import MOST_OVERFLOWS, WINDOW, Guard, save_batch

CONFIG = TrainConfig(spike=10.0)


def after_the_start(config: TrainConfig = CONFIG, size: float = 2.0) -> Guard:
    """A guard that has seen as many steps as it needs."""
    guard = Guard(config)
    for step in range(WINDOW + 1):
        assert guard.problem({"loss": size}, 1.0, step) is None
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_term_that_is_not_finite_is_named(value: float) -> None:
    found = Guard(CONFIG).problem({"loss": value, "class_loss": 1.0, "kd/0": value}, 1.0, 7)
    assert found is not None and f"the term 'kd/0' of the loss is {value} at step 7" in found


def test_a_gradient_that_is_not_finite() -> None:
    found = Guard(CONFIG).problem({"loss": 1.0}, math.nan, 3)
    assert found is not None and "the gradient is nan at step 3, and the loss is finite" in found


def test_float16_may_leave_out_some_steps_in_a_row() -> None:
    guard = Guard(CONFIG, scales=True)
    for step in range(MOST_OVERFLOWS):
        assert guard.problem({"loss": 1.0}, math.inf, step) is None
    assert guard.problem({"loss": 1.0}, 1.0, 60) is None
    for step in range(MOST_OVERFLOWS):
        assert guard.problem({"loss": 1.0}, math.inf, step) is None
    found = guard.problem({"loss": 1.0}, math.inf, 99)
    assert found is not None and f"for {MOST_OVERFLOWS + 1} steps in a row" in found and "bfloat16" in found


@pytest.mark.parametrize(("size", "highest"), [(2.0, 22.0), (0.01, 10.01)])
def test_a_jump_of_the_loss(size: float, highest: float) -> None:
    """Ten times the size at the start, which is 1 at least."""
    assert after_the_start(size=size).problem({"loss": highest - 1e-3}, 1.0, 50) is None
    found = after_the_start(size=size).problem({"loss": highest + 1e-3}, 1.0, 50)
    assert found is not None and "at step 50, by more than 10 times its size at the start" in found
    assert after_the_start(TrainConfig(spike=None), size).problem({"loss": 1e9}, 1.0, 50) is None


def test_a_loss_may_be_high_at_the_start_and_negative_later() -> None:
    guard = Guard(CONFIG)
    falling = [1000.0, 10.0, *(2.0 - step / 10 for step in range(60))]
    assert [guard.problem({"loss": loss}, 1.0, 0) for loss in falling] == [None] * len(falling)
    # Its size at the start was 1.25, the median of twenty, and -2.95 is where it stands.
    assert guard.size == pytest.approx(1.25)
    assert guard.problem({"loss": 9.5}, 1.0, 0) is None
    assert guard.problem({"loss": 9.75}, 1.0, 0) is not None


def test_it_goes_on_from_its_state() -> None:
    guard, again = after_the_start(), Guard(CONFIG)
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict()
    assert again.problem({"loss": 25.0}, 1.0, 50) is not None


def test_the_batch_is_saved_with_where_it_stood(tmp_path: Path) -> None:
    batch = Batch(torch.rand(2, 3, 4, 4), torch.rand(2, 10), torch.tensor([7, 3]))
    path = save_batch(tmp_path, batch, epoch=2, step=9, rank=1)
    assert path == tmp_path / "bad-batch-step9-rank1.safetensors"
    found = load_file(path)
    assert all(torch.equal(found[name], value) for name, value in batch._asdict().items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"epoch": "2", "step": "9", "rank": "1"}
