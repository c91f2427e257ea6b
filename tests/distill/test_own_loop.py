"""The loops in docs/your-own-loop.md run as they stand, train the student and leave files that are of use."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from vmkd_fx.distill.checkpoint import load_weights

PAGE = Path(__file__).parents[2] / "docs" / "your-own-loop.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install 'vmkd-fx[loops]'")


def run(loop: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The first block, then one of the loops, in `folder`; returns the names that they made, and
    "before", the student as it was.
    """
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(BLOCKS[0], f"{PAGE}: the beginning", "exec"), names)
    names["before"] = copy.deepcopy(names["student"]).eval()
    exec(compile(BLOCKS[loop], f"{PAGE}: loop {loop}", "exec"), names)
    return names


def accuracy(model: nn.Module, batches: list[Any]) -> float:
    model.eval().cpu()
    with torch.no_grad():
        right = torch.cat([model(images).argmax(1) == targets for images, targets in batches])
    return right.float().mean().item()


def plain() -> nn.Module:
    torch.manual_seed(7)
    return timm.create_model("test_vit", img_size=32, num_classes=10)


def check_trained(names: dict[str, Any]) -> None:
    held_out = names["held_out"]
    before, after = (accuracy(names[name], held_out) for name in ("before", "student"))
    assert after > max(0.4, before + 0.2)
    assert accuracy(vx.strip(names["task"]), held_out) == after
    assert not any(parameter.grad is not None for parameter in names["teacher"].parameters())


def test_the_page_has_a_beginning_and_three_loops() -> None:
    assert len(BLOCKS) == 4
    assert 'found["loss"].backward()' in BLOCKS[1] and "lightning" in BLOCKS[2] and "accelerate" in BLOCKS[3]


def test_as_timm_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(1, tmp_path, monkeypatch)
    check_trained(names)
    assert capsys.readouterr().out.count("top-1") == names["EPOCHS"]
    model = plain()
    load_weights(model, tmp_path / "last.pth.tar")  # of the two states in the file the averaged one
    average = names["task"].get_eval_model(ema=True)
    assert accuracy(model, names["held_out"]) == accuracy(average, names["held_out"])


@needs("lightning")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_with_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(2, tmp_path, monkeypatch)
    check_trained(names)
    figures = names["trainer"].callback_metrics
    assert {"train/loss", "train/vitkd/mimicking", "train/nkd/0", "accuracy"} <= set(figures)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not any("teachers" in key for key in state)
    again = vx.wrap(plain(), "vitkd+nkd", [names["teacher"]], epochs=names["EPOCHS"])
    loaded = names["Distillation"](again).load_state_dict(state, strict=False)
    assert all(key.startswith("task.teachers.") for key in loaded.missing_keys)
    assert loaded.unexpected_keys == []
    assert accuracy(again.get_eval_model(), names["held_out"]) == accuracy(
        names["student"], names["held_out"]
    )


@needs("accelerate")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_with_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(3, tmp_path, monkeypatch)
    check_trained(names)
    model = plain()
    model.load_state_dict(torch.load(tmp_path / "last.pth", weights_only=True)["state_dict"], strict=True)
    assert accuracy(model, names["held_out"]) == accuracy(names["student"], names["held_out"])
