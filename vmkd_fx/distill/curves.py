"""What the logs of trainings say, as curves and as a table of last and best figures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmkd_fx.distill.run_folder import LOG
from vmkd_fx.errors import DataError
from vmkd_fx.table import table

Points = list[tuple[float, float]]

SCORES = ("accuracy", "ema_accuracy")
_BOOKKEEPING = ("event", "step", "epoch", "batch", "seconds", "time")


@dataclass
class Run:
    """One training as its log tells it.

    Attributes:
        name: short, and different for each run of a comparison.
        path: of the log.
        steps: of the last line.
        steps_per_epoch: None before the end of the first epoch.
        logged: by name, (step, value) of what is logged while it trains: loss, its terms, "lr".
        scores: by name, (step, share) of what is judged before the first and at the end of epochs.
        teachers: accuracy of each teacher, by its model's name, where it was judged.
    """

    name: str
    path: Path
    steps: int = 0
    steps_per_epoch: float | None = None
    logged: dict[str, Points] = field(default_factory=dict)
    scores: dict[str, Points] = field(default_factory=dict)
    teachers: dict[str, float] = field(default_factory=dict)

    def add(self, line: dict[str, Any]) -> None:
        """One line of the log."""
        step = self.steps = int(line["step"])
        event = line.get("event")
        if event == "epoch":
            self.steps_per_epoch = step / (int(line["epoch"]) + 1)
        for teacher in line.get("teachers", ()):
            if teacher["accuracy"] is not None:
                self.teachers[teacher["model"]] = teacher["accuracy"]
        for name, value in line.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if name in _BOOKKEEPING or not number:
                continue
            if name.endswith("accuracy"):
                self.scores.setdefault(name, []).append((step, value))
            elif event == "step":
                self.logged.setdefault(name, []).append((step, value))


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Run], list[Path]]:
    """The runs in these folders, or logs (.jsonl), and what is no run.

    Raises:
        DataError: there is no log at all, or one is damaged or empty.
    """
    given = list(dict.fromkeys(Path(path) for path in paths))
    logs = {path: path / LOG if path.is_dir() else path for path in given}
    found = [path for path in given if logs[path].is_file() and logs[path].suffix == ".jsonl"]
    if not found:
        named = ", ".join(map(str, given)) or "nothing"
        raise DataError(f"no log of a training in {named}: name folders that `vmkd train` wrote, with {LOG}")
    names = _short(found)
    runs = [_read(name, logs[path]) for name, path in zip(names, found, strict=True)]
    return runs, [path for path in given if path not in found]


def summary(runs: Sequence[Run]) -> str:
    """The last and the best figures of each run, a row each."""
    header = ("run", "step", "epoch", "loss", "lr", "accuracy", "best", "averaged", "best averaged")
    return table(header, [_row(run) for run in runs], right=header[1:])


def _row(run: Run) -> tuple[str | None, ...]:
    epochs = None if run.steps_per_epoch is None else f"{run.steps / run.steps_per_epoch:.4g}"
    last = [f"{run.logged[name][-1][1]:.4g}" if name in run.logged else None for name in ("loss", "lr")]
    scores: list[str | None] = []
    for name in SCORES:
        points = run.scores.get(name)
        if points is None:
            scores += [None, None]
            continue
        step, best = max(points, key=lambda point: point[1])
        at = "" if run.steps_per_epoch is None else f" (epoch {round(step / run.steps_per_epoch)})"
        scores += [f"{100 * points[-1][1]:.2f} %", f"{100 * best:.2f} %{at}"]
    return (run.name, str(run.steps), epochs, *last, *scores)


def _read(name: str, path: Path) -> Run:
    run = Run(name, path)
    try:
        # What a running training has not finished writing is no line yet.
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
        for number, line in enumerate(lines, 1):
            try:
                run.add(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(f"{path}:{number} is no line of a training's log ({error!r})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not run.logged and not run.scores:
        raise DataError(f"{path} has no steps yet")
    return run


def _short(paths: Sequence[Path]) -> list[str]:
    """Names without the folders that all paths share, and without the log's own name."""
    parts = [(path.parent if path.suffix == ".jsonl" else path).absolute().parts for path in paths]
    shared = 0
    while all(len(names) > shared + 1 for names in parts) and len({names[shared] for names in parts}) == 1:
        shared += 1
    return ["/".join(names[shared:]) for names in parts]
