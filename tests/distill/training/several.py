"""Trainings by several processes, as DistributedDataParallel and fully_shard do them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.task import ClassificationTask

from tests.distill.processes import DATA
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.trainer import fit
from vmkd_fx.distill.training.world import World
from vmkd_fx.errors import TrainingError

SGD: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 16,
    "optimizer": "sgd",
    "lr": 0.05,
    "ema_decay": 0.9,
    "clip_grad": 1.0,
    "checkpoint_every": 3,
    "evaluate_every": 2,
}
WORDS = "breaks here"


class Breaking(ClassificationTask):
    """Breaks in the step after `steps`; None never."""

    def __init__(self, model: torch.nn.Module, steps: int | None) -> None:
        super().__init__(model, verbose=False)
        self.steps = steps

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.steps is not None and self.training:
            if self.steps == 0:
                raise TrainingError(WORDS)
            self.steps -= 1
        return super().forward(input, target)


def student(drop_rate: float = 0.0) -> torch.nn.Module:
    """Without BatchNorm, whose statistics are each process's own."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10, img_size=16, drop_rate=drop_rate)


def train(out: Path, world: World, steps: int | None = None, drop_rate: float = 0.0, **settings: Any) -> None:
    task = Breaking(student(drop_rate), steps)
    config = TrainConfig(**{**SGD, **settings})
    fit(task, DATA, config, out, digest="several", progress=False, world=world)


def whole_and_broken(rank: int, size: int, folder: Path, distributed: str) -> None:
    """A training without dropout in "same", one with dropout in "whole", and that again, broken at step 5 and
    gone on with, in "broken".
    """
    world = World(torch.device("cpu"), rank, size)
    train(folder / "same", world, distributed=distributed)
    train(folder / "whole", world, drop_rate=0.1, distributed=distributed)
    try:
        train(folder / "broken", world, steps=5, drop_rate=0.1, distributed=distributed)
    except TrainingError as error:
        assert str(error) == WORDS
        train(folder / "broken", world, drop_rate=0.1, distributed=distributed)
