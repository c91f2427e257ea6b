"""What a training says when it stops, and in its log."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from tests.distill.data.pictures import make_folders
from tests.distill.run_folders import lines
from vmkd_fx.distill.data import Digits, open_data
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.trainer import fit
from vmkd_fx.errors import TrainingError


class Nothing(nn.Module):
    """A loss that is no number."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.sum() * math.nan


@pytest.mark.parametrize("full", [False, True])
def test_what_went_wrong_is_said_even_where_the_batch_cannot_be_saved(tmp_path: Path, full: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    task = ClassificationTask(model, criterion=Nothing(), verbose=False)
    config = TrainConfig(epochs=1, batch_size=10, evaluate_first=False)
    batch = tmp_path / "bad-batch-step1-rank0.safetensors"
    if full:
        batch.mkdir()
    with pytest.raises(TrainingError, match="the term 'loss' of the loss is nan at step 1") as stopped:
        fit(task, Digits(labelled=10, image_size=16), config, tmp_path, digest="d", progress=False)
    assert batch.is_file() is not full
    assert ("its batch could not be saved: cannot write" in str(stopped.value)) is full
    assert ("the batch is in" in str(stopped.value)) is not full


def test_images_that_cannot_be_read_are_counted_in_the_log(tmp_path: Path) -> None:
    make_folders(tmp_path / "photos", classes=2, train=6, val=1)
    torch.manual_seed(0)
    task = ClassificationTask(timm.create_model("test_resnet", num_classes=2), verbose=False)
    config = TrainConfig(epochs=2, batch_size=6, evaluate_first=False)
    (tmp_path / "photos" / "train" / "class_1" / "broken.jpg").write_bytes(b"no image")
    data = open_data("folder", root=str(tmp_path / "photos"), image_size=32, max_bad=0.1)
    fit(task, data, config, tmp_path / "out", digest="d", progress=False)
    assert [line["bad_images"] for line in lines(tmp_path / "out", "pace")] == [1, 1]
