"""Accuracy on the held-out images: of the student, its average and its teachers, shared out to all processes.

Every process judges its part of the images, with the running statistics of process 0. Autocast is that of the
training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vmkd_fx.distill.data import ImageData
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.distill.teachers import Teacher
from vmkd_fx.distill.training.precision import Precision
from vmkd_fx.distill.training.signals import Stop
from vmkd_fx.distill.training.world import World
from vmkd_fx.graph.edit import LOGITS
from vmkd_fx.graph.share import unwrapped

_BETTER = 0.1
"""A teacher that has not come this share of the way from guessing to always right is named."""


class StoppedError(Exception):
    """Someone asked for a stop while images were judged."""


@dataclass(frozen=True)
class Validation:
    """Judges modules of one training.

    Attributes:
        task: that of the training.
        data: whose held-out images are judged.
        world: the processes.
        precision: autocast.
        stop: looked at after every batch.
    """

    task: TrainingTask
    data: ImageData
    world: World
    precision: Precision
    stop: Stop

    def student(self, ema: bool = False) -> float:
        """Accuracy of the student or its average, 0 to 1.

        Raises:
            StoppedError: someone asked for a stop.
        """
        trained = self.task.get_trainable_module(ema=ema)
        assert trained is not None
        self.world.share_buffers(unwrapped(trained))
        # Outside of DistributedDataParallel, which would talk to the others at every batch.
        inner = trained.module if isinstance(trained, DistributedDataParallel) else None
        model = self.task.get_eval_model(module=inner, ema=ema)
        evaluator = self.task.create_evaluator()

        def judge(images: Tensor, targets: Tensor) -> None:
            evaluator.update(model(images), targets)

        with _evaluating(model):
            self._over_images(judge)
        return float(evaluator.compute(distributed=self.world.joined)["top1"]) / 100

    def teachers(self) -> list[dict[str, Any]]:
        """Name and accuracy of each teacher, None where it knows other classes; caches are left out.

        Raises:
            StoppedError: someone asked for a stop.
        """
        if not isinstance(self.task, DistillationTask):
            return []
        live = [teacher for teacher in self.task.teachers if isinstance(teacher, Teacher)]
        return [{"model": teacher.info.name, "accuracy": self._teacher(teacher)} for teacher in live]

    def _teacher(self, teacher: Teacher) -> float | None:
        counts = torch.zeros(3, dtype=torch.int64, device=self.world.device)

        def judge(images: Tensor, targets: Tensor) -> None:
            logits = teacher(images)[LOGITS]
            comparable = logits.ndim == 2 and logits.shape[1] == self.data.num_classes
            right = (logits.argmax(1) == targets).sum() if comparable else counts.new_zeros(())
            counts.add_(torch.stack([right, counts.new_tensor(len(targets)), counts.new_tensor(comparable)]))

        self._over_images(judge)
        right, images, comparable = self.world.total(counts).tolist()
        return right / images if comparable else None

    @torch.no_grad()
    def _over_images(self, judge: Callable[[Tensor, Tensor], None]) -> None:
        shares = self.data.validation_batches(rank=self.world.rank, world_size=self.world.size)
        for images, targets, _ in shares:
            with self.precision.autocast():
                judge(images.to(self.world.device), targets.to(self.world.device))
            # Several processes cannot agree here without waiting for each other at every batch.
            if self.stop.asked and not self.world.joined:
                raise StoppedError
        if self.world.any(self.stop.asked):
            raise StoppedError


class _evaluating:  # noqa: N801 (reads as the context that it is)
    """A module in eval mode, and back."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, module.training

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train(self.before)


def warn_of_teachers(teachers: list[dict[str, Any]], classes: int) -> None:
    """Say on standard error which teachers do hardly better than guessing: wrong classes show here."""
    guessing = 1 / classes
    for teacher in teachers:
        accuracy = teacher["accuracy"]
        if accuracy is not None and accuracy < guessing + _BETTER * (1 - guessing):
            print(
                f"teacher {teacher['model']} is right on {100 * accuracy:.2f} % of the held-out images, and "
                f"guessing among {classes} classes on {100 * guessing:.2f} %: its weights, or its classes "
                "or their order, may be others than the data set's",
                file=sys.stderr,
                flush=True,
            )
