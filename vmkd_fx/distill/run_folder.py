"""The folder of one training: its files, its log, and the record that it is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmkd_fx.distill.differences import differences
from vmkd_fx.errors import CheckpointError, OutputError
from vmkd_fx.files import write_text

RESUME = "resume.pt"
DONE = "done.json"
LOG = "log.jsonl"
LAST = "last.safetensors"
LAST_EMA = "last_ema.safetensors"
BEST = "best.safetensors"
TENSORBOARD = "tensorboard"
MLFLOW = "mlflow-run"
BAD_BATCHES = "bad-batch-*.safetensors"

_SHOWN = 8


@dataclass(frozen=True)
class TrainResult:
    """How a training ended.

    Attributes:
        accuracy: of the last weights on the held-out images, 0 to 1.
        ema_accuracy: of the averaged weights; None where there are none.
        steps: optimiser steps in all.
        seconds: spent in training and evaluation, over every start of it.
        resumed_from: the step that the last start went on from; None if it was the first.
        weights: the last weights, safetensors.
        ema_weights: the averaged weights; None where there are none.
    """

    accuracy: float
    ema_accuracy: float | None
    steps: int
    seconds: float
    resumed_from: int | None
    weights: Path
    ema_weights: Path | None


class Log:
    """Lines of JSON, each with a "step" and each handed to the system before the next step begins."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, line: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            OutputError: the disk is full, or the folder cannot be written to.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def has(self, event: str) -> bool:
        """Whether there is a whole line of this event."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return any(json.loads(line)["event"] == event for line in text.splitlines())

    def cut(self, step: int) -> None:
        """Drop the lines after `step`, and a last line that was never finished.

        Raises:
            CheckpointError: the file holds something else than a log.
        """
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        try:
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{self.path} is not the log of a training ({error}); move it away"
            ) from error
        write_text(self.path, "".join(kept))


@dataclass(frozen=True)
class Identity:
    """Which training this is.

    Attributes:
        digest: of everything that decides the result.
        settings: what that is, as plain data, to say what differs when the digest does.
    """

    digest: str
    settings: Mapping[str, Any]

    def check(self, what: str, digest: str, settings: Mapping[str, Any]) -> None:
        """Refuse what another training left; `what` it is begins the message.

        Raises:
            CheckpointError: names the settings that differ.
        """
        if digest == self.digest:
            return
        changes = differences(settings, json.loads(json.dumps(self.settings)))
        if len(changes) > _SHOWN:
            changes[_SHOWN:] = [f"{len(changes) - _SHOWN} settings more differ"]
        found = "; ".join(changes) or "the settings are the same, and what they stand for differs"
        raise CheckpointError(
            f"{what} of another recipe ({digest[:12]}, now {self.digest[:12]}): {found}. Give this recipe a "
            "folder of its own, or start over with resume=False (vmkd train --restart)"
        )


def record(out: Path, training: Identity, result: TrainResult) -> None:
    """Note in `out` that the training is done, then remove what it would have gone on from."""
    names = {"weights": result.weights.name, "ema_weights": result.ema_weights and result.ema_weights.name}
    content = {**asdict(result), **names, "digest": training.digest, "settings": training.settings}
    write_text(out / DONE, json.dumps(content, indent=2) + "\n")
    (out / RESUME).unlink(missing_ok=True)


def recorded(out: Path, training: Identity) -> TrainResult | None:
    """The result that `record` noted in `out`; None if the training is not done.

    Raises:
        CheckpointError: it is the result of another recipe, or damaged.
    """
    path = out / DONE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, settings = content.pop("digest"), content.pop("settings", {})
        content["weights"] = out / content["weights"]
        content["ema_weights"] = content["ema_weights"] and out / content["ema_weights"]
        result = TrainResult(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); start over with resume=False (vmkd train --restart)"
        ) from error
    training.check(f"{out} holds a finished training", found, settings)
    if missing := [file.name for file in (result.weights, result.ema_weights) if file and not file.exists()]:
        raise CheckpointError(
            f"{path} says that the training is done, but {' and '.join(missing)} is gone; "
            f"start over with resume=False (vmkd train --restart)"
        )
    return result


def tidy(out: Path, everything: bool) -> None:
    """Remove half-written files that a killed process left and, if asked, the earlier training itself."""
    for name in (DONE, RESUME, LOG, LAST, LAST_EMA, BEST, MLFLOW):
        for left in out.glob(f".{name}.*.tmp"):
            left.unlink()
        if everything:
            (out / name).unlink(missing_ok=True)
    if everything:
        shutil.rmtree(out / TENSORBOARD, ignore_errors=True)
        for batch in out.glob(BAD_BATCHES):
            batch.unlink()
