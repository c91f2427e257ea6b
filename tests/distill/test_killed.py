"""A training that is killed, or asked to stop, ends in the weights of one that nobody touched."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distill.run_folders import WEIGHTS, determined, lines
from tests.distill.train_digits import INTERVAL, STEPS, STOPPED, Training
from vmkd_fx.distill.checkpoint import load_resume
from vmkd_fx.files import sha256

MANY = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a whole training of so many processes."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def trained(size: int) -> Path:
        out = folder / str(size)
        if not out.exists():
            training = Training(out, size)
            assert training.wait() == [0] * size, training.said.read_text()
        return out

    return trained


def run_to(training: Training, out: Path, starts: int, step: int) -> None:
    """Wait until the start after `starts` earlier ones has logged `step`, or ended."""
    while training.running():
        if len(lines(out, "resumed")) == starts and any(line["step"] >= step for line in lines(out, "step")):
            return
        time.sleep(0.002)


def assert_same(whole: Path, other: Path) -> None:
    for file in WEIGHTS:
        assert sha256(whole / file) == sha256(other / file), file
    assert determined(whole) == determined(other)
    assert not list(other.glob(".*"))


@pytest.mark.parametrize(
    ("size", "kills"),
    [(1, 3), pytest.param(1, 20, marks=MANY), pytest.param(2, 20, marks=MANY)],
)
def test_killed_at_random_moments(
    tmp_path: Path, undisturbed: Callable[[int], Path], size: int, kills: int
) -> None:
    out = tmp_path / "killed"
    moments = sorted(random.sample(range(1, STEPS - 3), kills))
    logged = []
    for starts, moment in enumerate(moments):
        training = Training(out, size)
        run_to(training, out, starts, moment)
        time.sleep(random.random() * 0.02)  # not always right behind a line of the log
        assert training.kill() == [-signal.SIGKILL] * size, training.said.read_text()
        logged.append(max((line["step"] for line in lines(out, "step")), default=0))
    last = Training(out, size)
    assert last.wait() == [0] * size, last.said.read_text()

    resumed = [line["step"] for line in lines(out, "resumed")]
    # A step is in the log before its checkpoint is on disk, so as much as one whole interval is repeated.
    assert all(before - INTERVAL <= step <= before for step, before in zip(resumed, logged, strict=True))
    assert f"resumed from step {resumed[-1]} of {STEPS}" in last.said.read_text()
    assert_same(undisturbed(size), out)


@pytest.mark.parametrize(("size", "rank"), [pytest.param(1, 0, marks=MANY), (2, 1)])
def test_asked_to_stop_it_saves_and_says_so(
    tmp_path: Path, undisturbed: Callable[[int], Path], size: int, rank: int
) -> None:
    out = tmp_path / "stopped"
    training = Training(out, size)
    run_to(training, out, 0, 6)
    training.terminate(rank)
    assert training.wait() == [STOPPED] * size, training.said.read_text()

    step = load_resume(out / "resume.pt").step
    assert lines(out, "step")[-1]["step"] == step < STEPS
    assert f"stopped by SIGTERM at step {step} of {STEPS}" in training.said.read_text()
    again = Training(out, size)
    assert again.wait() == [0] * size, again.said.read_text()
    assert [line["step"] for line in lines(out, "resumed")] == [step]
    assert_same(undisturbed(size), out)


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "one"
    first = Training(out)
    run_to(first, out, 0, 2)
    second = Training(out)
    assert second.wait() == [1]
    assert first.kill() == [-signal.SIGKILL]
    said = second.said.read_text()
    assert f"another training is in that folder, process {first.processes[0].pid} on " in said
    third = Training(out)  # the lock of a process that was killed is nobody's
    assert third.wait() == [0], third.said.read_text()
