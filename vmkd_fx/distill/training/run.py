"""A training between its first and its last step."""

from __future__ import annotations

import math
import sys
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
    Identity,
    Log,
    TrainResult,
    record,
)
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.distill.training.guards import Guard, batch_file, how_to_look, save_batch
from vmkd_fx.distill.training.loggers import Loggers
from vmkd_fx.distill.training.pace import Pace
from vmkd_fx.distill.training.seeds import seed_all, seed_process
from vmkd_fx.distill.training.setup import prepare
from vmkd_fx.distill.training.sharding import whole
from vmkd_fx.distill.training.signals import Stop
from vmkd_fx.distill.training.state import Checkpoints, Position
from vmkd_fx.distill.training.step import Gradients, Stepper, check_shares
from vmkd_fx.distill.training.validation import StoppedError, Validation, warn_of_teachers
from vmkd_fx.distill.training.world import World
from vmkd_fx.errors import OutputError, TrainingError, TrainingStoppedError
from vmkd_fx.progress import Progress


class Run:
    """Steps, evaluations and what is written down of them; what changes in it is what `ResumeState` holds.

    All processes of `world` call the same methods in the same order. `log` is process 0's to open.
    """

    def __init__(
        self,
        task: TrainingTask,
        data: ImageData,
        config: TrainConfig,
        out: Path,
        training: Identity,
        about: dict[str, Any],
        world: World,
        stop: Stop,
    ) -> None:
        self.task, self.data, self.config = task, data, config
        self.out, self.training, self.about = out, training, about
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
        self.checkpoints = Checkpoints(out / RESUME, training, self.parts, self.guard, world)
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
        step, rank = self.at.step + 1, self.world.rank
        mine = not all(map(math.isfinite, found.own.values()))
        guilty = [other for other, is_bad in enumerate(self.world.gathered(mine)) if is_bad] or [rank]
        try:
            save_batch(self.out, batch, epoch=self.at.epoch, step=step, rank=rank)
            look = how_to_look(batch_file(self.out, step, guilty[0]))
        except OutputError as error:
            look = f"its batch could not be saved: {error}"
        raise TrainingError(f"{problem}; {look}")

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
        unreadable = self.world.gathered({bad.name for bad in self.data.bad_images})
        bad = len({name for names in unreadable for name in names})
        if figures := self.pace.figures() | ({"bad_images": bad} if bad else {}):
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
        about = {**self.about, "recipe": self.training.digest, "step": self.at.step, **about}
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
        self.world.from_first(lambda: record(self.out, self.training, result))
        return result
