"""The trainer: timm's optimiser, schedule, weight average, clipping and evaluator around one training task.

A step depends on the state in the checkpoint and on (seed, epoch, batch), and on nothing else. So a training
that was killed and started again ends in the same weights, bit for bit, on CPUs with the same number of
processes and threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from timm.task import TrainingTask

from vmkd_fx.distill.data import ImageData
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.run_folder import Identity, TrainResult, recorded, tidy
from vmkd_fx.distill.training.lock import locked
from vmkd_fx.distill.training.loggers import opened
from vmkd_fx.distill.training.run import Run
from vmkd_fx.distill.training.signals import stop_on_signals
from vmkd_fx.distill.training.world import World
from vmkd_fx.files import make_folder
from vmkd_fx.progress import progress as follow


def fit(
    task: TrainingTask,
    data: ImageData,
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    digest: str,
    settings: Mapping[str, Any] | None = None,
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
        settings: what that is, as `Recipe.decisive` gives it: named where another training is in `out`; None
            is `config` alone.
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
    training = Identity(digest, settings or config.model_dump(mode="json"))
    if resume and (result := world.from_first(lambda: recorded(out, training))) is not None:
        if world.first:
            print(
                f"{out}: this training is done; resume=False (vmkd train --restart) begins anew",
                file=sys.stderr,
            )
        return result
    with ExitStack() as held, stop_on_signals() as stop:
        world.from_first(lambda: held.enter_context(locked(out)))
        world.from_first(lambda: tidy(out, everything=not resume))
        run = Run(task, data, config, out, training, {"model": name, **(about or {})}, world, stop)
        resumed_from = run.resume()

        def open_log() -> None:
            shown = {"model": name, **config.model_dump()}
            run.log = held.enter_context(opened(out, run.at.step, digest, config.loggers, shown))

        world.from_first(open_log)
        run.begin(resumed_from)
        show = progress and world.first
        with follow(run.total_steps, f"training {name}".strip(), initial=run.at.step, show=show) as bar:
            while run.at.epoch < config.epochs:
                run.train_epoch(bar)
        return run.finish(resumed_from)
