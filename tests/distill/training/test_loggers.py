from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from vmkd_fx.distill.run_folder import MLFLOW, TENSORBOARD
from vmkd_fx.distill.training import loggers
from vmkd_fx.distill.training.loggers import Loggers, opened
from vmkd_fx.errors import MissingExtraError, OutputError

LINE = {"event": "step", "step": 3, "epoch": 0, "loss": 2.5, "kd/0": 1.0, "grad_norm": math.inf}


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def test_a_line_is_json_even_where_a_number_is_none(tmp_path: Path) -> None:
    with opened(tmp_path, 0, "d" * 64, (), {}) as loggers:
        loggers.add(LINE)
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {**LINE, "grad_norm": None}


class Failing:
    """A service that is gone after its first figures."""

    def __init__(self) -> None:
        self.taken: list[dict[str, float]] = []

    def add(self, figures: dict[str, float], step: int) -> None:
        if self.taken:
            raise ConnectionError("no route to host")
        self.taken.append(figures)

    def close(self) -> None:
        raise ConnectionError("no route to host")


def test_a_writer_that_fails_is_left_out_and_the_log_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path, 0, "d" * 64, (), {}) as loggers:
        failing = Failing()
        loggers.writers.append(failing)
        for _ in range(3):
            loggers.add(LINE)
    assert failing.taken == [{"step/epoch": 0, "step/loss": 2.5, "step/kd/0": 1.0}]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert capsys.readouterr().err == "Failing is left out from now on: no route to host\n"


def test_the_log_itself_may_not_fail(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with (
        pytest.raises(OutputError, match=r"cannot write .*log\.jsonl"),
        opened(tmp_path, 0, "d" * 64, (), {}) as loggers,
    ):
        loggers.add(LINE)


def test_a_process_that_writes_nothing() -> None:
    Loggers(None, []).add(LINE)


@needs("tensorboard")
def test_tensorboard_drops_what_an_interrupted_start_wrote_behind_the_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, losses in ((0, (9.0, 8.0, 7.0)), (2, (6.0,))):
        with opened(tmp_path, start, "d" * 64, (), {}) as loggers:
            for step, loss in enumerate(losses, start + 1):
                loggers.add({"event": "step", "step": step, "loss": loss})
    read = EventAccumulator(str(tmp_path / TENSORBOARD))
    read.Reload()
    assert [(found.step, found.value) for found in read.Scalars("step/loss")] == [(1, 9), (2, 8), (3, 6)]


@needs("wandb")
def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with opened(tmp_path, 0, "d" * 64, ("wandb",), {"lr": 0.1}) as loggers:
        loggers.add(LINE)
        assert any(type(writer).__name__ == "WeightsAndBiases" for writer in loggers.writers)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@needs("mlflow")
def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for step in (3, 4):
        with opened(tmp_path, step - 1, "d" * 64, ("mlflow",), {"lr": 0.1}) as loggers:
            loggers.add({**LINE, "step": step})
            assert any(type(writer).__name__ == "MLflow" for writer in loggers.writers)
    run = (tmp_path / MLFLOW).read_text().strip()
    history = mlflow.MlflowClient().get_metric_history(run, "step/loss")
    assert [(found.step, found.value) for found in history] == [(3, 2.5), (4, 2.5)]


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_writer_that_is_not_installed_names_its_extra(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    message = rf"train.loggers: \[{package}\] needs the package '{package}'.*vmkd-fx\[{package}\]"
    with pytest.raises(MissingExtraError, match=message), opened(tmp_path, 0, "d" * 64, (package,), {}):
        pass


def test_a_service_that_does_not_start_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def start() -> Failing:
        raise ConnectionError("no route to host")

    assert loggers._started("wandb", start) is None
    assert capsys.readouterr().err == "wandb is left out: no route to host\n"
    found = Failing()
    assert loggers._started("wandb", lambda: found) is found
