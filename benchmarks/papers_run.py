"""Trainings side by side, whose results outlive the run."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from vmkd_fx.distill.card import restore
from vmkd_fx.distill.data import open_data
from vmkd_fx.distill.evaluate import accuracy
from vmkd_fx.distill.recipe import Recipe
from vmkd_fx.distill.task import Predictor
from vmkd_fx.distill.train import train
from vmkd_fx.errors import VmkdError
from vmkd_fx.models import register
from vmkd_fx.progress import progress

Scores = dict[str, float]
"""Accuracy from 0 to 1 by prediction: "class", the class head, and "mean", where there are more heads."""

_WITH_HEADS = {"std", "std-intermediate", "cit"}
"""Presets whose students have a head for each teacher."""


class Results:
    """Scores by recipe, a line of JSON each, in a file that outlives the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if not text.endswith("\n") and text:  # half a line, of a run that was killed
            path.write_text("".join(lines), encoding="utf-8")
        self._found: dict[str, Scores] = {line["digest"]: line["scores"] for line in map(json.loads, lines)}

    def add(self, recipe: Recipe, about: str, scores: Scores) -> None:
        """Note what a training gave."""
        line = {"digest": recipe.digest(), "about": about, "scores": scores}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._found[recipe.digest()] = scores

    def of(self, recipe: Recipe) -> Scores | None:
        """The scores of a training; None if it was not done."""
        return self._found.get(recipe.digest())


def perform(recipe: Recipe, keep: bool) -> Scores | str:
    """Train, and return the accuracy by each prediction, or why it failed; without `keep` the folder goes."""
    torch.set_num_threads(1)
    register()
    try:
        result = train(recipe, progress=False)
        scores = {"class": result.accuracy}
        if _WITH_HEADS & {method.preset for method in recipe.method}:
            student, _ = restore(result.weights)
            data = open_data(**recipe.data.model_dump())
            scores["mean"] = accuracy(Predictor(student, "mean").eval(), data)
    except VmkdError as error:
        return f"{type(error).__name__}: {error}"
    if not keep:
        shutil.rmtree(recipe.out)
    return scores


def perform_all(
    jobs: Sequence[tuple[str, Recipe]], results: Results, what: str, workers: int, keep: bool = False
) -> list[str]:
    """Do the jobs, each with what it is about, that have no result yet; returns what failed and why.

    Args:
        workers: processes side by side; 0 trains in this one.
    """
    wanted = {recipe.digest(): (about, recipe) for about, recipe in jobs}
    todo = {digest: job for digest, job in wanted.items() if results.of(job[1]) is None}
    failed: list[str] = []
    started = time.monotonic()
    with progress(len(wanted), what, initial=len(wanted) - len(todo)) as bar:
        finished = _performed([recipe for _, recipe in todo.values()], workers, keep)
        for done, (recipe, scores) in enumerate(finished, start=1):
            about, _ = todo[recipe.digest()]
            if isinstance(scores, str):
                failed.append(f"{about}: {scores}")
            else:
                results.add(recipe, about, scores)
            left = (time.monotonic() - started) / done * (len(todo) - done)
            bar.note(f"{left / 60:.1f} min left")
            bar.update()
    return failed


def _performed(recipes: Sequence[Recipe], workers: int, keep: bool) -> Iterator[tuple[Recipe, Scores | str]]:
    """Each recipe and what `perform` gave, as they finish."""
    if not workers or not recipes:
        yield from ((recipe, perform(recipe, keep)) for recipe in recipes)
        return
    context: Any = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        waiting = {pool.submit(perform, recipe, keep): recipe for recipe in recipes}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """A worker whose run was killed would go on training, or wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
