"""`vmkd train --dry-run`: all that a training does up to and including one step, and nothing written."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.task import TrainingTask

from vmkd_fx.distill.checkpoint import load_resume
from vmkd_fx.distill.data import Batch, ImageData, batches_per_epoch, open_data
from vmkd_fx.distill.recipe import Recipe
from vmkd_fx.distill.run_folder import RESUME, Identity, recorded
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.distill.train import make_task
from vmkd_fx.distill.training.memory import Memory, estimate, in_bytes
from vmkd_fx.distill.training.pace import clock, peak_memory
from vmkd_fx.distill.training.setup import prepare
from vmkd_fx.distill.training.step import Stepper, check_shares
from vmkd_fx.distill.training.world import World, joined_world
from vmkd_fx.errors import RecipeError, TrainingError
from vmkd_fx.table import table

_QUICK = 5.0
"""Seconds below which the step is done a second time, for the first one warms up."""


@dataclass(frozen=True)
class DryRun:
    """What a training will be.

    Attributes:
        recipe: what was asked for.
        data: in words.
        models: rows of role, name and parameters.
        folder: what the output folder holds, in words.
        memory: what one process needs.
        peak: bytes of tensors that were in use at most, on a GPU; None elsewhere.
        terms: of the loss, at the step that was done.
        steps: of the whole training.
        step_seconds: for one step, of the images that are there already.
        load_seconds: for the images of the first step.
        processes, device: of the training, as it was started here.
    """

    recipe: Recipe
    data: str
    models: tuple[tuple[str, str, str], ...]
    folder: str
    memory: Memory
    peak: int | None
    terms: dict[str, float]
    steps: int
    step_seconds: float
    load_seconds: float
    processes: int
    device: str

    @property
    def seconds(self) -> float:
        """Of all steps: workers load beside a step, a batch each; without them a step waits for images."""
        workers = self.recipe.data.workers
        if workers:
            return self.steps * max(self.step_seconds, self.load_seconds / workers)
        return self.steps * (self.step_seconds + self.load_seconds)

    def __str__(self) -> str:
        config, images = self.recipe.train, self.recipe.train.batch_size
        terms = ", ".join(f"{name} {value:.4g}" for name, value in self.terms.items() if name != "loss")
        free = "" if self.memory.free is None else f", {in_bytes(self.memory.free)} are free"
        peak = "" if self.peak is None else f"; at most {in_bytes(self.peak)} were in use"
        rate = images / self.step_seconds
        where = self.device if self.processes == 1 else f"{self.processes} processes, {self.device}"
        return "\n".join(
            (
                table(("model", "name", "parameters"), self.models, right=("parameters",)),
                "",
                f"data: {self.data}",
                f"output: {self.folder}",
                f"one step on {where}: loss {self.terms['loss']:.4g}" + (terms and f" ({terms})"),
                f"memory: about {in_bytes(self.memory.total)} a process ({self._parts()}){free}{peak}",
                f"time: {self.steps} steps of {images} images, {config.epochs} epochs, in about "
                f"{clock(self.seconds)} and validation besides ({1e3 * self.step_seconds:.0f} ms a step, "
                f"{rate:.0f} images/s; the first images took {1e3 * self.load_seconds:.0f} ms to load)",
                "nothing was written",
            )
        )

    def _parts(self) -> str:
        memory = self.memory
        named = {
            "student": memory.student,
            "teachers": memory.teachers,
            "gradients": memory.gradients,
            "optimiser": memory.optimizer,
            "average": memory.average,
            f"activations of {memory.images} images": memory.activations,
        }
        return ", ".join(f"{name} {in_bytes(size)}" for name, size in named.items() if size)


def dry_run(recipe: Recipe) -> DryRun | None:
    """Check everything that a training needs, do one step of it, and write nothing.

    Under torchrun every process calls this; None in all but the first.

    Raises:
        VmkdError: what a training would refuse: names, folders, classes, checkpoints, another recipe in the
            output folder.
        RecipeError: it does not fit in memory.
        TrainingError: the loss of the first step is not finite.
    """
    with joined_world(recipe.train.device) as world:
        found = _dry_run(recipe, world)
        return found if world.first else None


def _dry_run(recipe: Recipe, world: World) -> DryRun:
    config = recipe.train
    folder = world.from_first(lambda: _folder(recipe))
    data = open_data(**recipe.data.model_dump())
    check_shares(len(data), config, world)
    torch.manual_seed(config.seed)
    task = make_task(recipe, data).to(world.device)
    models = _models(recipe, task)
    memory = estimate(task, data, config, world)
    if world.any(memory.missing > 0):
        raise RecipeError(memory.problem(config) or "another process says that the training does not fit")
    each = batches_per_epoch(len(data), config.batch_size)
    stepper = _prepared(task, recipe, world, each)
    batches = _batches(recipe, data, world)
    started = time.perf_counter()
    batch = next(batches)
    loaded = time.perf_counter() - started
    terms, took = _step(stepper, batch)
    if took < _QUICK:
        _, took = _step(stepper, batch)
    return DryRun(
        recipe=recipe,
        data=f"{data.name}, {len(data)} training images in {data.num_classes} classes, {data.input_size}",
        models=models,
        folder=folder,
        memory=memory,
        peak=peak_memory(world.device) if world.device.type == "cuda" else None,
        terms=terms,
        steps=config.epochs * each,
        step_seconds=took,
        load_seconds=loaded,
        processes=world.size,
        device=str(world.device),
    )


def _prepared(task: TrainingTask, recipe: Recipe, world: World, steps_per_epoch: int) -> Stepper:
    parts = prepare(task, recipe.train, world, steps_per_epoch)
    parts.scheduler.step_update(0)
    if isinstance(task, DistillationTask):
        task.set_epoch(0)
    task.train()
    return Stepper(task, parts.optimizer, recipe.train, world, parts.precision)


def _batches(recipe: Recipe, data: ImageData, world: World) -> Iterator[Batch]:
    return data.train_batches(
        0,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        rank=world.rank,
        world_size=world.size,
    )


def _step(stepper: Stepper, batch: Batch) -> tuple[dict[str, float], float]:
    """The terms of the loss and the seconds that a step takes."""
    started = time.perf_counter()
    found = stepper.gradients(batch, False)
    stepper.apply()
    if stepper.world.device.type == "cuda":
        torch.cuda.synchronize(stepper.world.device)
    if bad := [name for name, value in found.terms.items() if not math.isfinite(value)]:
        raise TrainingError(f"the term {bad[-1]!r} of the loss is {found.terms[bad[-1]]} at the first step")
    return found.terms, time.perf_counter() - started


def _models(recipe: Recipe, task: TrainingTask) -> tuple[tuple[str, str, str], ...]:
    student = task.get_trainable_module()
    assert student is not None
    count = sum(parameter.numel() for parameter in student.parameters())
    added = sum(p.numel() for name, p in student.named_parameters() if name.startswith("vmkd."))
    more = f", {_millions(added)} of them for training alone" if added else ""
    rows = [("student", recipe.student.model + more, _millions(count))]
    for config, teacher in zip(recipe.teachers, getattr(task, "teachers", ()), strict=False):
        known = sum(parameter.numel() for parameter in teacher.parameters())
        name = config.model if config.cache is None else f"cache {config.cache}"
        rows.append(("teacher", name, _millions(known) if known else ""))
    return tuple(rows)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _folder(recipe: Recipe) -> str:
    """What the output folder holds, in words.

    Raises:
        CheckpointError: a training of another recipe, or a damaged one.
    """
    out, training = Path(recipe.out), Identity(recipe.digest(), recipe.decisive())
    if (result := recorded(out, training)) is not None:
        return f"{out} holds this training, finished: accuracy {100 * result.accuracy:.2f} %"
    path = out / RESUME
    if not path.exists():
        return f"{out}, from the beginning"
    state = load_resume(path)
    training.check(f"{path} is", state.digest, state.settings)
    return f"{out} holds this training up to step {state.step}, from which it would go on"
