"""Where a training's figures go: log.jsonl always, TensorBoard where it is installed, others where asked.

log.jsonl is the truth: it is cut back to the checkpoint when a training goes on, and a line that cannot be
written ends the training. Whatever else fails says so once and is left out from then on.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from vmkd_fx.distill.run_folder import LOG, MLFLOW, TENSORBOARD, Log
from vmkd_fx.errors import MissingExtraError
from vmkd_fx.extras import require
from vmkd_fx.files import write_text

_NO_FIGURES = ("event", "step")
PROJECT = "vmkd-fx"


class Writer(Protocol):
    """Something that takes named figures of a step."""

    def add(self, figures: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """log.jsonl and every writer that there is.

    Args:
        log: the lines; None in a process that writes nothing.
        writers: the rest.
    """

    def __init__(self, log: Log | None, writers: list[Writer]) -> None:
        self.log, self.writers = log, writers

    def add(self, line: dict[str, Any]) -> None:
        """Write one line, with an "event" and a "step"; its numbers are figures named `<event>/<key>`.

        Raises:
            OutputError: log.jsonl cannot be written.
        """
        if self.log is None:
            return
        self.log.add({key: _finite(value) for key, value in line.items()})
        found = {f"{line['event']}/{key}": value for key, value in line.items() if _is_figure(key, value)}
        for writer in tuple(self.writers) if found else ():
            try:
                writer.add(found, line["step"])
            except Exception as error:  # a network or a service of someone else's: the training outlives it
                self.writers.remove(writer)
                print(f"{type(writer).__name__} is left out from now on: {error}", file=sys.stderr)

    def close(self) -> None:
        """Let every writer finish."""
        for writer in self.writers:
            try:
                writer.close()
            except Exception as error:
                print(f"{type(writer).__name__} did not finish: {error}", file=sys.stderr)


@contextmanager
def opened(
    out: Path, step: int, digest: str, asked: tuple[str, ...], settings: Mapping[str, Any]
) -> Iterator[Loggers]:
    """The loggers of a training that goes on from `step`, for as long as the block runs.

    Args:
        out: its folder.
        step: figures of later steps, of a start that was cut short, are dropped where the writer can.
        digest: of the recipe; runs are known again by it.
        asked: "wandb", "mlflow".
        settings: shown beside the run.

    Raises:
        MissingExtraError: a writer was asked for and is not installed.
    """
    mark = hashlib.sha256(f"{out.resolve()} {digest}".encode()).hexdigest()[:16]
    services: dict[str, Callable[[], Writer]] = {
        "wandb": lambda: WeightsAndBiases(out, mark, settings, goes_on=step > 0),
        "mlflow": lambda: MLflow(out, settings),
    }
    found = [_tensorboard(out, step), *(_started(name, services[name]) for name in asked)]
    loggers = Loggers(Log(out / LOG), [writer for writer in found if writer is not None])
    try:
        yield loggers
    finally:
        loggers.close()


def _started(name: str, start: Callable[[], Writer]) -> Writer | None:
    """A writer; None where its service cannot be had now, which is said."""
    try:
        return start()
    except MissingExtraError:
        raise
    except Exception as error:  # no network, no account: the training does not wait for it
        print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
        return None


class TensorBoard:
    """TensorBoard's files in the folder `tensorboard`."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def add(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _tensorboard(out: Path, step: int) -> TensorBoard | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        return None
    return TensorBoard(SummaryWriter(str(out / TENSORBOARD), purge_step=step + 1))


class WeightsAndBiases:
    """A run of Weights & Biases: one a folder and recipe, gone on with when the training is."""

    def __init__(self, out: Path, mark: str, settings: Mapping[str, Any], goes_on: bool) -> None:
        wandb = require("wandb", extra="wandb", purpose="train.loggers: [wandb]")
        # Without `resume` an earlier run of this name is replaced, as its folder was: W&B drops figures of
        # steps before the last one that it has.
        again = "allow" if goes_on else None
        self._run = wandb.init(
            project=PROJECT, dir=str(out), name=out.name, id=mark, resume=again, config=dict(settings)
        )

    def add(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, gone on with when the training is: its id stands in the folder."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        mlflow = require("mlflow", extra="mlflow", purpose="train.loggers: [mlflow]")
        note = out / MLFLOW
        known = note.read_text(encoding="utf-8").strip() if note.exists() else None
        if known is None:
            mlflow.set_experiment(PROJECT)
        self._mlflow, self._run = mlflow, mlflow.start_run(run_id=known, run_name=out.name)
        if known is None:
            mlflow.log_params({key: str(value)[:250] for key, value in settings.items()})
            write_text(note, self._run.info.run_id + "\n")

    def add(self, figures: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(figures, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _is_figure(key: str, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and key not in _NO_FIGURES and math.isfinite(value)


def _finite(value: Any) -> Any:
    """JSON has no infinity: the norm of a gradient that overflowed in float16 is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
