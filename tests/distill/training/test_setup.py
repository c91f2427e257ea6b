from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import vmkd_fx as vx
from tests.distill.run_folders import lines
from tests.models import images
from vmkd_fx.distill.data import Digits
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.distill.trainer import fit
from vmkd_fx.distill.training.setup import _synchronise


def task() -> DistillationTask:
    torch.manual_seed(0)
    student = timm.create_model("test_resnet", num_classes=10)
    teacher = timm.create_model("test_vit", num_classes=10, img_size=16)
    return vx.wrap(student, "kd", [teacher], input_size=(3, 16, 16))


def trained(out: Path, **settings: Any) -> list[float]:
    config = TrainConfig(epochs=1, batch_size=10, ema_decay=0.9, evaluate_first=False, **settings)
    fit(task(), Digits(labelled=30, image_size=16), config, out, digest="d", progress=False)
    return [line["loss"] for line in lines(out, "step")]


def test_synchronised_statistics_keep_names_tensors_and_outputs() -> None:
    student = vx.trace(timm.create_model("test_resnet", num_classes=10)).eval()
    x, keys = images(2), list(student.state_dict())
    expected, first = student(x), student.get_parameter("bn1.weight")
    assert any(isinstance(part, nn.BatchNorm2d) for part in student.modules())
    _synchronise(student)
    kinds = [type(part).__name__ for part in student.modules() if "BatchNorm" in type(part).__name__]
    assert kinds and all(kind.startswith("SyncBatchNorm") for kind in kinds)
    assert list(student.state_dict()) == keys and student.get_parameter("bn1.weight") is first
    assert torch.equal(student.eval()(x), expected)


def test_channels_last_computes_the_same(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain")
    assert trained(tmp_path / "last", channels_last=True) == pytest.approx(plain, rel=1e-3)


def test_bfloat16_trains_weights_in_float32(tmp_path: Path) -> None:
    plain, half = trained(tmp_path / "plain"), trained(tmp_path / "half", amp="bfloat16")
    assert half == pytest.approx(plain, rel=0.05) and half != plain
    weights = load_file(tmp_path / "half" / "last.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}


@pytest.mark.slow
def test_compiled_trains_the_same_under_the_same_names(tmp_path: Path) -> None:
    plain, compiled = trained(tmp_path / "plain"), trained(tmp_path / "compiled", compile=True)
    assert compiled == pytest.approx(plain, rel=1e-3)
    for file in ("last.safetensors", "last_ema.safetensors"):
        names = [list(load_file(tmp_path / kind / file)) for kind in ("plain", "compiled")]
        assert names[0] == names[1]
