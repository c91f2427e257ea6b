"""The trainer: timm's optimiser, schedule, weight average, clipping and evaluator around one training task.

A step depends on the state in the checkpoint and on (seed, epoch, batch), and on nothing else. So a training
that was killed and started again ends in the same weights, bit for bit, on CPUs with the same number of
processes and threads.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from timm.task import TrainingTask
from torch import nn

from vmkd_fx.distill.checkpoint import save_state
from vmkd_fx.distill.data import Batch, ImageData, batches_per_epoch
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.run_folder import (
    BEST,
    LAST,
    LAST_EMA,
    LOG,
    RESUME,
    Log,
    TrainResult,
    record,
    recorded,
    tidy,
)
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.distill.training.guards import Guard, how_to_look, save_batch
from vmkd_fx.distill.training.lock import locked
from vmkd_fx.distill.training.loggers import Loggers, opened
from vmkd_fx.distill.training.pace import Pace
from vmkd_fx.distill.training.seeds import seed_all, seed_process
from vmkd_fx.distill.training.setup import prepare
from vmkd_fx.distill.training.sharding import whole
from vmkd_fx.distill.training.signals import Stop, stop_on_signals
from vmkd_fx.distill.training.state import Checkpoints, Position
from vmkd_fx.distill.training.step import Gradients, Stepper, check_shares
from vmkd_fx.distill.training.validation import StoppedError, Validation, warn_of_teachers
from vmkd_fx.distill.training.world import World
from vmkd_fx.errors import TrainingError, TrainingStoppedError
from vmkd_fx.files import make_folder
from vmkd_fx.progress import Progress
from vmkd_fx.progress import progress as follow


def fit(
    task: TrainingTask,
    data: ImageData,
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    digest: str,
    name: str = "",
    about: Mapping[str, Any] | None = None,
    resume: bool = True,
    progress: bool = True,
    world: World | None = None,
) -> TrainResult:
    """Train `task` to the end of `config.epochs`, from where the folder `out` says that it stands.

    `out` receives log.jsonl (lines of "event" and "step": started or resumed, before, step, epoch, pace),
    TensorBoard's files where that is installed, resume.pt every `config.checkpoint_every` steps,
    best.safetensors (the weights that did best on the held-out images, averaged ones where there are any;
    their score is optimistic for that reason), and at the end last.safetensors, last_ema.safetensors and
    done.json. A folder with a finished training of this digest is read, not trained again. SIGTERM and SIGINT
    end the step in work, save and raise; a second SIGINT interrupts at once.

    Args:
        task: its forward gives {"loss", "output", named scalar terms}.
        data: the images.
        config: optimiser, schedule and how often things are written.
        out: folder of this training alone.
        digest: of everything that decides the result, as `Recipe.digest` gives it.
        name: of the model, kept in the metadata of the weights.
        about: plain data that is kept there too.
        resume: False removes what `out` holds of an earlier training and starts over.
        progress: show a bar, or lines where there is no terminal.
        world: the processes that train together, each of which calls this; None is this one alone, on the
            task's device.

    Raises:
        CheckpointError: `out` holds a training of another recipe or model, or a damaged checkpoint.
        RecipeError: a batch cannot be shared out evenly, or a setting does not go with this machine.
        TrainingError: the loss or the gradient is not finite, or jumped; the batch is saved beside.
        TrainingStoppedError: a signal asked for it; the state is saved.
        OutputError: another process trains in `out`, it cannot be written to, or the disk is full.
    """
    world = world or World(task.device)
    out = world.from_first(lambda: make_folder(out))
    if resume and (result := world.from_first(lambda: recorded(out, digest))) is not None:
        return result
    with ExitStack() as held, stop_on_signals() as stop:
        world.from_first(lambda: held.enter_context(locked(out)))
        world.from_first(lambda: tidy(out, everything=not resume))
        run = _Run(task, data, config, out, digest, {"model": name, **(about or {})}, world, stop)
        resumed_from = run.resume()
        if world.first:
            settings = {"model": name, **config.model_dump()}
            run.log = held.enter_context(opened(out, run.at.step, digest, config.loggers, settings))
        run.begin(resumed_from)
        show = progress and world.first
        with follow(run.total_steps, f"training {name}".strip(), initial=run.at.step, show=show) as bar:
            while run.at.epoch < config.epochs:
                run.train_epoch(bar)
        return run.finish(resumed_from)


class _Run:
    """A training between its first and its last step; what changes in it is what `ResumeState` holds."""

    def __init__(
        self,
        task: TrainingTask,
        data: ImageData,
        config: TrainConfig,
        out: Path,
        digest: str,
        about: dict[str, Any],
        world: World,
        stop: Stop,
    ) -> None:
        self.task, self.data, self.config = task, data, config
        self.out, self.digest, self.about = out, digest, about
        self.world, self.stop, self.log = world, stop, Loggers(None, [])
        check_shares(len(data), config, world)
        self.steps_per_epoch = batches_per_epoch(len(data), config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.at = Position()
        self.shown = ""
        seed_all(config.seed)
        self.parts = prepare(task, config, world, self.steps_per_epoch)
        seed_process(config.seed, world.rank)
        self.stepper = Stepper(task, self.parts.optimizer, config, world, self.parts.precision)
        self.guard = Guard(config, self.parts.precision.scales)
        self.checkpoints = Checkpoints(out / RESUME, digest, config, self.parts, self.guard, world)
        self.validation = Validation(task, data, world, self.parts.precision, stop)
        self.pace = Pace(self.total_steps, min(len(data), config.batch_size), world.device)

    def begin(self, resumed_from: int | None) -> None:
        """Note the start and, before the first step, judge the student, its average and its teachers.

        Raises:
            TrainingStoppedError: a signal asked for it.
        """
        machine = {"processes": self.world.size, "device": self.world.device.type}
        if resumed_from is None:
            self.log.add({"event": "started", "step": 0, "steps": self.total_steps, **machine})
        else:
            self.log.add({"event": "resumed", "step": resumed_from, **machine})
            if self.world.first:
                text = f"{self.out}: resumed from step {resumed_from} of {self.total_steps}"
                print(text, file=sys.stderr, flush=True)
        judged = Log(self.out / LOG)
        if (
            self.at.step
            or not self.config.evaluate_first
            or self.world.from_first(lambda: judged.has("before"))
        ):
            return
        try:
            line = self._accuracies() | {"teachers": self.validation.teachers()}
        except StoppedError:
            self._save_and_stop()
        self.log.add({"event": "before", "step": 0, **line})
        if self.world.first:
            warn_of_teachers(line["teachers"], self.data.num_classes)

    def train_epoch(self, bar: Progress[int]) -> None:
        """The rest of the current epoch, with its evaluation and the checkpoints that fall into it.

        Raises:
            TrainingStoppedError: a signal asked for it.
        """
        if isinstance(self.task, DistillationTask):
            self.task.set_epoch(self.at.epoch)
        self.task.train()
        batches = self.data.train_batches(
            self.at.epoch,
            self.at.batch,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        self.pace.restart()
        for batch in self.pace.waiting(batches):
            stop = self._train_step(batch)
            self.pace.tick()
            bar.note(", ".join(filter(None, (self.shown, self.pace.said(self.at.step)))))
            bar.update()
            if stop:
                self._save_and_stop()
            if self.at.batch < self.steps_per_epoch and self.at.step % self.config.checkpoint_every == 0:
                self.checkpoints.save(self.at)
        self._end_epoch(bar)
        if self.at.step % self.config.checkpoint_every == 0:
            self.checkpoints.save(self.at)

    def _train_step(self, batch: Batch) -> bool:
        """One step; whether it shall be the last for now."""
        self.parts.scheduler.step_update(self.at.step)
        found = self.stepper.gradients(batch, self.stop.asked)
        if (problem := self.guard.problem(found.terms, found.norm, self.at.step + 1)) is not None:
            self._give_up(problem, batch, found)
        self.stepper.apply()
        self.at.stepped(found.terms)
        self.task.update_ema(step=self.at.step)
        if self.at.step % self.config.log_every == 0:
            line = {
                "event": "step",
                "step": self.at.step,
                "epoch": self.at.epoch,
                "lr": self._learning_rate(),
            }
            self.log.add({**line, **found.terms, "grad_norm": found.norm})
        return found.stop

    def _learning_rate(self) -> float:
        """The one of the recipe's schedule: groups may have a share of it."""
        return max(group["lr"] for group in self.parts.optimizer.param_groups)

    def _give_up(self, problem: str, batch: Batch, found: Gradients) -> None:
        where = {"epoch": self.at.epoch, "step": self.at.step + 1}
        path = save_batch(self.out, batch, rank=self.world.rank, **where)
        mine = not all(map(math.isfinite, found.own.values()))
        guilty = [rank for rank, is_bad in enumerate(self.world.gathered(mine)) if is_bad]
        if self.world.joined and guilty:
            path = path.with_name(path.name.replace(f"rank{self.world.rank}", f"rank{guilty[0]}"))
        raise TrainingError(f"{problem}; {how_to_look(path)}")

    def _end_epoch(self, bar: Progress[int]) -> None:
        last = self.at.epoch == self.config.epochs - 1
        line: dict[str, Any] = {"event": "epoch", "step": self.at.step, "epoch": self.at.epoch}
        line |= {key: value / self.steps_per_epoch for key, value in self.at.sums.items()}
        if last or (self.at.epoch + 1) % self.config.evaluate_every == 0:
            try:
                line |= self._evaluate()
            except StoppedError:
                self._save_and_stop()
            shown = [key for key in ("loss", "accuracy", "ema_accuracy") if key in line]
            self.shown = ", ".join(f"{key} {line[key]:.3f}" for key in shown)
            bar.note(self.shown)
        self.log.add(line)
        if figures := self.pace.figures():
            self.log.add({"event": "pace", "step": self.at.step, "epoch": self.at.epoch, **figures})
        self.at.next_epoch()

    def _evaluate(self) -> dict[str, float]:
        scores = self._accuracies()
        chosen = scores.get("ema_accuracy", scores["accuracy"])
        best = chosen > self.at.scores.get("best", -1.0)
        self.at.scores |= scores
        if best:
            self.at.scores["best"] = chosen
            best_module = self.parts.module if self.parts.ema is None else self.parts.ema
            self._save_weights(BEST, best_module, accuracy=chosen)
        return scores

    def _accuracies(self) -> dict[str, Any]:
        scores = {"accuracy": self.validation.student()}
        if self.parts.ema is not None:
            scores["ema_accuracy"] = self.validation.student(ema=True)
        return scores

    def resume(self) -> int | None:
        """Go to the checkpoint in `out` and tell its step.

        0 if an earlier start left a log but no checkpoint; None if this is the first start.
        """
        log = Log(self.out / LOG)
        position = self.checkpoints.load()
        if position is not None:
            self.at = position
        elif not self.world.from_first(log.path.exists):
            return None
        self.world.from_first(lambda: log.cut(self.at.step))
        return self.at.step

    def _save_and_stop(self) -> None:
        self.checkpoints.save(self.at)
        raise TrainingStoppedError(
            f"{self.out}: stopped by {self.stop.name or 'another process'} at step {self.at.step} of "
            f"{self.total_steps}, with everything saved; start it again to go on"
        )

    def _save_weights(self, file: str, module: nn.Module, **about: Any) -> Path:
        path, state = self.out / file, whole(module.state_dict())
        about = {**self.about, "recipe": self.digest, "step": self.at.step, **about}
        self.world.from_first(lambda: save_state(path, state, **about))
        return path

    def finish(self, resumed_from: int | None) -> TrainResult:
        """Write the last weights and, after them, that this training is done."""
        accuracy, ema_accuracy = self.at.scores["accuracy"], self.at.scores.get("ema_accuracy")
        ema = self.parts.ema
        average = None if ema is None else self._save_weights(LAST_EMA, ema, accuracy=ema_accuracy)
        result = TrainResult(
            accuracy=accuracy,
            ema_accuracy=ema_accuracy,
            steps=self.at.step,
            seconds=self.at.seconds,
            resumed_from=resumed_from,
            weights=self._save_weights(LAST, self.parts.module, accuracy=accuracy),
            ema_weights=average,
        )
        self.world.from_first(lambda: record(self.out, self.digest, result))
        return result
