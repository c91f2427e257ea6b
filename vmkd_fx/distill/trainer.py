"""The trainer: timm's optimiser, schedule, weight average, clipping and evaluator around one training task.

A step depends on the state in the checkpoint and on (seed, epoch, batch), and on nothing else. So a training
that was killed and started again ends in the same weights, bit for bit, on a CPU with the same number of
threads.
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from vmkd_fx.distill.checkpoint import (
    ResumeState,
    check_recipe,
    load_resume,
    load_state,
    rng_state,
    save_resume,
    save_weights,
    set_rng_state,
)
from vmkd_fx.distill.data import ImageData, batches_per_epoch
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
from vmkd_fx.errors import TrainingError
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
) -> TrainResult:
    """Train `task` to the end of `config.epochs`, from where the folder `out` says that it stands.

    `out` receives log.jsonl (a line a logged step and a line an epoch), resume.pt every
    `config.checkpoint_every` steps, best.safetensors (the weights that did best on the held-out images,
    averaged ones where there are any; their score is optimistic for that reason), and at the end
    last.safetensors, last_ema.safetensors and done.json. A folder with a finished training of this digest is
    read, not trained again.

    Args:
        task: its forward gives {"loss", "output", named scalar terms}; it stays on its device.
        data: the images.
        config: optimiser, schedule and how often things are written.
        out: folder of this training alone.
        digest: of everything that decides the result, as `Recipe.digest` gives it.
        name: of the model, kept in the metadata of the weights.
        about: plain data that is kept there too.
        resume: False removes what `out` holds of an earlier training and starts over.
        progress: show a bar, or lines where there is no terminal.

    Raises:
        CheckpointError: `out` holds a training of another recipe or model, or a damaged checkpoint.
        TrainingError: a loss is not finite.
        OutputError: `out` cannot be written to, or the disk is full.
    """
    out = make_folder(out)
    tidy(out, everything=not resume)
    if (result := recorded(out, digest)) is not None:
        return result
    run = _Run(task, data, config, out, digest, {"model": name, **(about or {})})
    resumed_from = run.resume()
    if resumed_from is not None:
        print(f"{out}: resumed from step {resumed_from} of {run.total_steps}", file=sys.stderr, flush=True)
    with follow(run.total_steps, f"training {name}".strip(), initial=run.step, show=progress) as bar:
        while run.epoch < config.epochs:
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
    ) -> None:
        self.task, self.data, self.config = task, data, config
        self.out, self.digest, self.about = out, digest, about
        self.log = Log(out / LOG)
        self.steps_per_epoch = batches_per_epoch(len(data), config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step = self.epoch = self.batch = 0
        self.sums: dict[str, float] = {}
        self.scores: dict[str, Any] = {}
        self.started = time.monotonic()
        _seed(config.seed)
        self.module: nn.Module = task.get_trainable_module()
        self.optimizer = create_optimizer_v2(
            self.module, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=config.schedule,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.lr / 100,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        if config.ema_decay is not None:
            # With warm-up, or a short training's average would still be its random beginning.
            task.setup_ema(decay=config.ema_decay, use_warmup=True)

    @property
    def ema(self) -> nn.Module | None:
        """The averaged copy of the trainable module."""
        average = self.task.get_trainable_module(ema=True)
        return None if average is None else average.module

    def train_epoch(self, bar: Progress[int]) -> None:
        """The rest of the current epoch, with its evaluation and the checkpoints that fall into it."""
        if isinstance(self.task, DistillationTask):
            self.task.set_epoch(self.epoch)
        self.task.train()
        config = self.config
        for images, targets in self.data.train_batches(
            self.epoch, self.batch, batch_size=config.batch_size, seed=config.seed
        ):
            self._train_step(images.to(self.task.device), targets.to(self.task.device))
            if self.batch == self.steps_per_epoch:
                self._end_epoch(bar)
            if self.step % config.checkpoint_every == 0:
                self._save()
            bar.update()

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        self.scheduler.step_update(self.step)
        output = self.task(images, targets)
        terms = {key: value.item() for key, value in output.items() if key != "output" and value.numel() == 1}
        self._check_finite(terms)
        self.optimizer.zero_grad()
        output["loss"].backward(create_graph=getattr(self.optimizer, "is_second_order", False))
        if self.config.clip_grad is not None:
            dispatch_clip_grad(self.task.get_clip_parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.step += 1
        self.batch += 1
        self.task.update_ema(step=self.step)
        self.sums = {key: self.sums.get(key, 0.0) + value for key, value in terms.items()}
        if self.step % self.config.log_every == 0:
            learning_rate = self.optimizer.param_groups[0]["lr"]
            self.log.add(
                {"event": "step", "step": self.step, "epoch": self.epoch, "lr": learning_rate, **terms}
            )

    def _check_finite(self, terms: dict[str, float]) -> None:
        bad = [key for key, value in terms.items() if not math.isfinite(value)]
        if bad:
            # "loss" is the sum of the others: where one of them is at fault, it is the better name.
            term = next((key for key in bad if key != "loss"), "loss")
            raise TrainingError(
                f"the term {term!r} of the loss is {terms[term]} at step {self.step + 1}: "
                f"try a smaller lr (now {self.config.lr}) or clip_grad (now {self.config.clip_grad})"
            )

    def _end_epoch(self, bar: Progress[int]) -> None:
        last = self.epoch == self.config.epochs - 1
        line: dict[str, Any] = {"event": "epoch", "step": self.step, "epoch": self.epoch}
        line |= {key: value / self.steps_per_epoch for key, value in self.sums.items()}
        if last or (self.epoch + 1) % self.config.evaluate_every == 0:
            line |= self._evaluate()
            shown = [key for key in ("loss", "accuracy", "ema_accuracy") if key in line]
            bar.note(", ".join(f"{key} {line[key]:.3f}" for key in shown))
        self.log.add(line)
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}

    def _evaluate(self) -> dict[str, float]:
        scores = {"accuracy": self._accuracy(ema=False)}
        if self.ema is not None:
            scores["ema_accuracy"] = self._accuracy(ema=True)
        self.task.train()
        chosen = scores.get("ema_accuracy", scores["accuracy"])
        best = chosen > self.scores.get("best", -1.0)
        self.scores |= scores
        if best:
            self.scores["best"] = chosen
            self._save_weights(BEST, self.module if self.ema is None else self.ema, accuracy=chosen)
        return scores

    @torch.no_grad()
    def _accuracy(self, ema: bool) -> float:
        model = self.task.get_eval_model(ema=ema).eval()
        evaluator = self.task.create_evaluator()
        for images, targets in self.data.validation_batches():
            evaluator.update(model(images.to(self.task.device)), targets.to(self.task.device))
        return evaluator.compute()["top1"] / 100

    def resume(self) -> int | None:
        """Go to the checkpoint in `out` and tell its step.

        0 if an earlier start left a log but no checkpoint; None if this is the first start.
        """
        path = self.out / RESUME
        if path.exists():
            state = load_resume(path)
            check_recipe(state, self.digest, self.config.model_dump(), path)
            load_state(self.module, state.module, str(path))
            if self.ema is not None and state.ema is not None:
                load_state(self.ema, state.ema, str(path))
            self.optimizer.load_state_dict(state.optimizer)
            self.step, self.epoch, self.batch = state.step, state.epoch, state.batch
            self.sums, self.scores = state.sums, state.scores
            self.started -= state.seconds
            set_rng_state(state.rng)
        elif not self.log.path.exists():
            return None
        self.log.cut(self.step)
        self.log.add({"event": "resumed", "step": self.step})
        return self.step

    def _save(self) -> None:
        state = ResumeState(
            digest=self.digest,
            config=self.config.model_dump(),
            step=self.step,
            epoch=self.epoch,
            batch=self.batch,
            module=self.module.state_dict(),
            ema=None if self.ema is None else self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
            rng=rng_state(),
            sums=self.sums,
            scores=self.scores,
            seconds=time.monotonic() - self.started,
        )
        save_resume(self.out / RESUME, state)

    def _save_weights(self, file: str, module: nn.Module, **about: Any) -> Path:
        path = self.out / file
        save_weights(path, module, **self.about, recipe=self.digest, step=self.step, **about)
        return path

    def finish(self, resumed_from: int | None) -> TrainResult:
        """Write the last weights and, after them, that this training is done."""
        accuracy, ema_accuracy = self.scores["accuracy"], self.scores.get("ema_accuracy")
        average = None if self.ema is None else self._save_weights(LAST_EMA, self.ema, accuracy=ema_accuracy)
        result = TrainResult(
            accuracy=accuracy,
            ema_accuracy=ema_accuracy,
            steps=self.step,
            seconds=time.monotonic() - self.started,
            resumed_from=resumed_from,
            weights=self._save_weights(LAST, self.module, accuracy=accuracy),
            ema_weights=average,
        )
        record(self.out, self.digest, result)
        return result


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
