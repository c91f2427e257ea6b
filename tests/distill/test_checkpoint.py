from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vmkd_fx.distill.checkpoint import (
    ResumeState,
    load_resume,
    load_weights,
    read_metadata,
    rng_state,
    save_resume,
    save_weights,
    set_rng_state,
)
from vmkd_fx.distill.run_folder import Identity
from vmkd_fx.errors import CheckpointError, OutputError
from vmkd_fx.files import sha256


class Student(nn.Module):
    """A student as training sees it: its own layer and, under the reserved prefix, what a pass added."""

    def __init__(self, width: int = 4, extra: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        if extra:
            self.vmkd = nn.ModuleDict({"head": nn.Linear(width, 2)})


def state(**changes: Any) -> ResumeState:
    torch.manual_seed(0)
    student = Student()
    optimizer = torch.optim.AdamW(student.parameters())
    student.body(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    values: dict[str, Any] = {
        "digest": "a" * 64,
        "settings": {"lr": 0.1, "epochs": 3},
        "step": 5,
        "epoch": 1,
        "batch": 2,
        "module": student.state_dict(),
        "ema": None,
        "optimizer": optimizer.state_dict(),
        "precision": {},
        "guard": {"recent": [2.5], "size": None, "overflows": 0},
        "rng": [rng_state()],
        "sums": {"loss": 0.1 + 0.2},
        "scores": {"accuracy": 1 / 3},
        "seconds": 1.5,
    }
    return ResumeState(**{**values, **changes})


def draws() -> list[float]:
    return [torch.rand(1).item(), random.random(), float(np.random.rand()), float(np.random.randn())]


def test_resume_state_comes_back_exactly(tmp_path: Path) -> None:
    np.random.seed(3)
    np.random.randn()
    saved = state()
    save_resume(tmp_path / "resume.pt", saved)
    expected = draws()
    loaded = load_resume(tmp_path / "resume.pt")
    set_rng_state(loaded.rng[0])
    assert draws() == expected
    assert (loaded.step, loaded.epoch, loaded.batch) == (5, 1, 2)
    assert loaded.sums == saved.sums and loaded.scores == saved.scores
    assert all(torch.equal(loaded.module[key], value) for key, value in saved.module.items())
    moments, expected_moments = loaded.optimizer["state"][0], saved.optimizer["state"][0]
    assert torch.equal(moments["exp_avg"], expected_moments["exp_avg"])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "list", "other", "code"])
def test_damaged_or_foreign_resume_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "resume.pt"
    save_resume(path, state())
    whole = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "flipped":
            middle = len(whole) // 2
            path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a checkpoint")
        case "list":
            torch.save([1, 2], path)
        case "other":
            torch.save({"state_dict": {}}, path)
        case "code":
            torch.save(Student(), path)
    with pytest.raises(CheckpointError, match=r"resume\.pt is damaged.*resume=False"):
        load_resume(path)


def test_another_recipe_says_what_differs() -> None:
    settings = {"student": {"model": "a"}, "train": {"lr": 0.1, "betas": (0.9, 0.99)}}
    left = json.loads(json.dumps(settings))  # tuples become lists on disk
    Identity("a" * 64, settings).check("x is", "a" * 64, {})
    other = {"student": {"model": "b"}, "train": {"lr": 0.2, "betas": (0.9, 0.99)}}
    said = r'x is of another recipe \(a{12}, now b{12}\): student.model was "a" and is "b"; train.lr was 0.1'
    with pytest.raises(CheckpointError, match=said):
        Identity("b" * 64, other).check("x is", "a" * 64, left)
    with pytest.raises(CheckpointError, match="the settings are the same, and what they stand for differs"):
        Identity("b" * 64, settings).check("x is", "a" * 64, left)
    many = {f"key{number}": number for number in range(20)}
    with pytest.raises(CheckpointError, match="key7 was absent and is 7; 12 settings more differ"):
        Identity("b" * 64, many).check("x is", "a" * 64, {})


def test_a_full_disk_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resume, weights = tmp_path / "resume.pt", tmp_path / "last.safetensors"
    save_resume(resume, state())
    save_weights(weights, Student())
    before = {path.name: sha256(path) for path in tmp_path.iterdir()}
    write_bytes = Path.write_bytes

    def full(self: Path, data: Any) -> int:
        write_bytes(self, bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"cannot write .*resume\.pt: No space left on device"):
        save_resume(resume, state(step=6))
    with pytest.raises(OutputError, match=r"cannot write .*last\.safetensors: No space left on device"):
        save_weights(weights, Student())
    assert {path.name: sha256(path) for path in tmp_path.iterdir()} == before
    assert load_resume(resume).step == 5


def test_weights_round_trip_with_metadata(tmp_path: Path) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    student, loaded = Student(), Student()
    student.norm(student.body(torch.rand(8, 3)))
    about = {"recipe": "r", "model": "student", "step": 9, "accuracy": 0.5}
    save_weights(path, student, **about)
    load_weights(loaded, path)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in student.state_dict().items())
    metadata = read_metadata(path)
    assert metadata.pop("version") and metadata == about
    for _ in range(5):
        save_weights(other, loaded, **dict(reversed(about.items())))
        assert sha256(path) == sha256(other)


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    save_weights(tmp_path / "tied.safetensors", tied)
    loaded = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    load_weights(loaded, tmp_path / "tied.safetensors")
    assert all(torch.equal(layer.weight, tied[0].weight) for layer in loaded)


@pytest.mark.parametrize("layout", ["plain", "state_dict", "model", "state_dict_ema", "module."])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_layouts_of_others(tmp_path: Path, layout: str, suffix: str) -> None:
    student, path = Student(), tmp_path / f"weights{suffix}"
    weights: dict[str, Any] = dict(student.state_dict())
    match layout:
        case "plain":
            torch.save(weights, path)
        case "module.":
            torch.save({f"module.{key}": value for key, value in weights.items()}, path)
        case "state_dict_ema":
            torch.save({"state_dict": Student().state_dict(), "state_dict_ema": weights, "epoch": 3}, path)
        case _:
            torch.save({layout: weights, "epoch": 3}, path)
    loaded = Student()
    load_weights(loaded, path)
    assert torch.equal(loaded.body.weight, student.body.weight)


def test_what_training_added_is_dropped_on_request(tmp_path: Path) -> None:
    path = tmp_path / "trained.safetensors"
    trained, plain = Student(extra=True), Student()
    save_weights(path, trained)
    with pytest.raises(
        CheckpointError, match=r"2 unexpected: vmkd\.head\.bias, vmkd\.head\.weight.*drop_prefix=True"
    ):
        load_weights(plain, path)
    load_weights(plain, path, drop_prefix=True)
    assert torch.equal(plain.body.weight, trained.body.weight)


def test_another_model_says_what_differs_and_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    save_weights(path, Student(width=5))
    narrow = Student()
    before = {key: value.clone() for key, value in narrow.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"Of 7 keys, 6 of another shape: body.weight \(5, 3\) for \(4, 3\).*\.\.\."
    ):
        load_weights(narrow, path)
    with pytest.raises(CheckpointError, match=r"7 missing: .*; 2 unexpected: 0.bias, 0.weight"):
        save_weights(path, nn.Sequential(nn.Linear(1, 1)))
        load_weights(narrow, path)
    assert all(torch.equal(narrow.state_dict()[key], value) for key, value in before.items())


def test_unreadable_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no weights file"):
        load_weights(Student(), tmp_path / "none.safetensors")
    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"\x00" * 100)
        with pytest.raises(CheckpointError, match="cannot read weights from"):
            load_weights(Student(), tmp_path / name)
    torch.save(Student(), tmp_path / "code.pth")
    with pytest.raises(
        CheckpointError, match=r"cannot read weights.*neither safetensors nor a torch file of plain tensors"
    ):
        load_weights(Student(), tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "no_tensors.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_weights(Student(), tmp_path / "no_tensors.pth")
    with pytest.raises(CheckpointError, match="as safetensors"):
        read_metadata(tmp_path / "broken.safetensors")
