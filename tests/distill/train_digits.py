"""A small training in a process of its own, for a test to kill: `train_digits.py OUT CHECKPOINT_EVERY`."""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from timm.task import LogitDistillationTask

from vmkd_fx.distill.data import Digits
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.trainer import fit


def main(out: Path, checkpoint_every: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Dropout and drop path draw from the global generator, and BatchNorm keeps running statistics.
    student = timm.create_model("test_resnet", num_classes=10, drop_rate=0.1, drop_path_rate=0.1)
    teacher = timm.create_model("test_vit", num_classes=10, img_size=32)
    task = LogitDistillationTask(student, teacher, distill_loss_weight=0.5, verbose=False)
    config = TrainConfig(
        epochs=5,
        batch_size=16,
        warmup_epochs=1,
        ema_decay=0.9,
        clip_grad=1.0,
        checkpoint_every=checkpoint_every,
        evaluate_every=2,
        seed=3,
    )
    fit(task, Digits(labelled=200), config, out, digest="digits", name="test_resnet", progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
