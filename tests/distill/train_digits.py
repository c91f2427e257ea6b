"""A small training in processes of its own, for a test to kill."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import timm
import torch
from timm.task import LogitDistillationTask

from tests.distill.processes import DATA, Group
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.trainer import fit
from vmkd_fx.distill.training.world import World
from vmkd_fx.errors import TrainingStoppedError

INTERVAL = 4
STEPS = 30
STOPPED = 75


class Training(Group):
    """One start of the training in `out`; what its processes say goes to a file."""

    def __init__(self, out: Path, size: int = 1) -> None:
        self.said = Path(tempfile.mkstemp(dir=out.parent, prefix=f"{out.name}-said-")[1])
        super().__init__(out.parent, size, main, out, self.said)

    def terminate(self, rank: int = 0) -> None:
        """SIGTERM to one of them."""
        self.processes[rank].terminate()


def main(rank: int, size: int, out: Path, said: Path) -> None:
    sys.stderr = said.open("a", buffering=1)
    try:
        train(out, World(torch.device("cpu"), rank, size))
    except TrainingStoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(STOPPED)


def train(out: Path, world: World) -> None:
    torch.manual_seed(0)
    # Dropout and drop path draw from the global generator, and BatchNorm keeps running statistics.
    student = timm.create_model("test_resnet", num_classes=10, drop_rate=0.1, drop_path_rate=0.1)
    teacher = timm.create_model("test_vit", num_classes=10, img_size=16)
    task = LogitDistillationTask(student, teacher, distill_loss_weight=0.5, verbose=False)
    config = TrainConfig(
        epochs=6,
        batch_size=16,
        warmup_epochs=1,
        ema_decay=0.9,
        clip_grad=1.0,
        checkpoint_every=INTERVAL,
        evaluate_every=3,
        evaluate_first=False,
        seed=3,
    )
    fit(task, DATA, config, out, digest="digits", name="test_resnet", progress=False, world=world)
