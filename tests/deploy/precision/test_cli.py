"""`vmkd deploy --precision`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vmkd_fx.cli import main
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.runtime import load


@pytest.fixture
def weights(tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    return [str(tmp_path / "w.safetensors"), "--model", "test_resnet", "--option", "num_classes=10"]


def test_int8_without_images_is_refused(
    weights: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["deploy", *weights, "--precision", "int8", "--out", str(tmp_path / "b")]) == 2
    assert "give calibrate=, --calibrate FOLDER" in capsys.readouterr().err
    line = ["--precision", "fp16", "--calibrate", str(tmp_path / "none"), "--out", str(tmp_path / "b")]
    assert main(["deploy", *weights, *line]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_int8_from_the_command_line(
    weights: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for index in range(4):
        pixels = random.integers(0, 256, (180, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
    line = ["--precision", "int8", "--calibrate", str(tmp_path / "pictures"), "--out", str(tmp_path / "b")]
    assert main(["deploy", *weights, *line]) == 0
    printed = capsys.readouterr().out
    assert "against float32 on 4 calibration images: int8" in printed
    bundle = read_bundle(tmp_path / "b")
    assert bundle.manifest.precision == "int8" and len(bundle.manifest.kept) == 2
    assert load(tmp_path / "b", device="cpu")([tmp_path / "pictures" / "0.png"]).shape == (1, 10)
