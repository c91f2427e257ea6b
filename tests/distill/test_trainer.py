from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.task import ClassificationTask, LogitDistillationTask

from tests.distill.run_folders import WEIGHTS, determined, lines
from vmkd_fx.distill import checkpoint
from vmkd_fx.distill.checkpoint import load_resume, load_weights, read_metadata
from vmkd_fx.distill.data import Digits
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.run_folder import TrainResult
from vmkd_fx.distill.trainer import fit
from vmkd_fx.distill.training import state
from vmkd_fx.errors import CheckpointError, OutputError, TrainingError
from vmkd_fx.files import sha256

CONFIG = TrainConfig(
    epochs=4,
    batch_size=8,
    warmup_epochs=1,
    ema_decay=0.9,
    clip_grad=1.0,
    checkpoint_every=3,
    evaluate_every=2,
    evaluate_first=False,
)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(labelled=40, image_size=16)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these only get slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(name: str = "test_resnet", **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, drop_rate=0.1, drop_path_rate=0.1, **options)


def train(
    out: Path, digits: Digits, task: Any = None, config: TrainConfig = CONFIG, **options: Any
) -> TrainResult:
    task = task or ClassificationTask(model(), criterion_kwargs={"smoothing": 0.1}, verbose=False)
    return fit(task, digits, config, out, **{"digest": "d" * 64, "progress": False, **options})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    train(out, digits, name="test_resnet")
    return out


class InterruptedTrainingError(Exception):
    """Stands in for whatever ends a process."""


class Breaking(ClassificationTask):
    """Breaks in the step after `steps`."""

    def __init__(self, steps: int) -> None:
        super().__init__(model(), criterion_kwargs={"smoothing": 0.1}, verbose=False)
        self.steps = steps

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.steps == 0:
            raise InterruptedTrainingError
        self.steps -= 1
        return super().forward(input, target)


def test_log_has_every_step_and_epoch(undisturbed: Path) -> None:
    steps, epochs = lines(undisturbed, "step"), lines(undisturbed, "epoch")
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert [line["step"] for line in epochs] == [5, 10, 15, 20]
    assert ["accuracy" in line for line in epochs] == [False, True, False, True]
    rates = [line["lr"] for line in steps]
    assert rates[0] == pytest.approx(CONFIG.lr / 100) and max(rates) == rates[5] > rates[-1]
    mean = sum(line["loss"] for line in steps[:5]) / 5
    assert epochs[0]["loss"] == pytest.approx(mean)


def test_result_is_that_of_the_written_weights(undisturbed: Path, digits: Digits) -> None:
    recorded = json.loads((undisturbed / "done.json").read_text())
    assert recorded["steps"] == 20 and recorded["resumed_from"] is None
    assert not (undisturbed / "resume.pt").exists()
    for file, key in (("last.safetensors", "accuracy"), ("last_ema.safetensors", "ema_accuracy")):
        plain = timm.create_model("test_resnet", num_classes=10).eval()
        load_weights(plain, undisturbed / file)
        with torch.no_grad():
            hits = [plain(images).argmax(1) == targets for images, targets, _ in digits.validation_batches()]
        assert torch.cat(hits).float().mean().item() == pytest.approx(recorded[key])
        assert read_metadata(undisturbed / file)["accuracy"] == recorded[key]
    assert read_metadata(undisturbed / "last.safetensors")["model"] == "test_resnet"
    last, average = (load_file(undisturbed / file) for file in WEIGHTS[:2])
    assert not torch.equal(last["fc.weight"], average["fc.weight"])


@pytest.mark.parametrize("steps", [1, 4, 5, 9, 10, 15, 19])
def test_interrupted_anywhere_ends_in_the_same_weights(
    tmp_path: Path, digits: Digits, undisturbed: Path, steps: int
) -> None:
    with pytest.raises(InterruptedTrainingError):
        train(tmp_path, digits, Breaking(steps))
    result = train(tmp_path, digits, name="test_resnet")
    assert result.resumed_from == steps // CONFIG.checkpoint_every * CONFIG.checkpoint_every
    for file in WEIGHTS:
        expected, found = load_file(undisturbed / file), load_file(tmp_path / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert determined(tmp_path) == determined(undisturbed)


def test_resume_needs_every_part_of_the_state(
    tmp_path: Path, digits: Digits, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above compare does depend on the random state."""
    with pytest.raises(InterruptedTrainingError):
        train(tmp_path, digits, Breaking(10))
    monkeypatch.setattr(state, "set_rng_state", lambda state: None)
    train(tmp_path, digits, name="test_resnet")
    assert sha256(tmp_path / "last.safetensors") != sha256(undisturbed / "last.safetensors")


def test_a_finished_training_is_read_and_not_repeated(tmp_path: Path, digits: Digits) -> None:
    first = train(tmp_path, digits)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert train(tmp_path, digits, Breaking(0)) == first
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with pytest.raises(
        CheckpointError, match=r"finished training of another recipe .dddddddddddd, now eeeeeeeeeeee"
    ):
        train(tmp_path, digits, digest="e" * 64)
    with pytest.raises(InterruptedTrainingError):
        train(tmp_path, digits, Breaking(2), resume=False)
    assert [line["step"] for line in lines(tmp_path, "step")] == [1, 2]
    assert not (tmp_path / "done.json").exists() and not (tmp_path / "last.safetensors").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"digest": "d"}', "{"])
def test_damaged_record_of_the_end(tmp_path: Path, digits: Digits, content: str) -> None:
    (tmp_path / "done.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"done\.json is damaged.*resume=False"):
        train(tmp_path, digits)


def test_finished_training_without_its_weights(tmp_path: Path, digits: Digits) -> None:
    train(tmp_path, digits)
    (tmp_path / "last.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"last\.safetensors is gone"):
        train(tmp_path, digits)


def test_checkpoint_of_another_recipe_or_model(tmp_path: Path, digits: Digits) -> None:
    with pytest.raises(InterruptedTrainingError):
        train(tmp_path, digits, Breaking(4))
    checkpoint_before = sha256(tmp_path / "resume.pt")
    faster = CONFIG.model_copy(update={"lr": 0.1})
    with pytest.raises(CheckpointError, match=r"is of another recipe.*: lr was 0\.001 and is 0\.1\."):
        train(tmp_path, digits, config=faster, digest="e" * 64)
    other = ClassificationTask(model("test_vit", img_size=16), verbose=False)
    with pytest.raises(CheckpointError, match=r"resume\.pt belongs to another model.*missing: cls_token"):
        train(tmp_path, digits, other)
    assert sha256(tmp_path / "resume.pt") == checkpoint_before


def test_damaged_checkpoint(tmp_path: Path, digits: Digits) -> None:
    with pytest.raises(InterruptedTrainingError):
        train(tmp_path, digits, Breaking(4))
    path = tmp_path / "resume.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"resume\.pt is damaged"):
        train(tmp_path, digits)
    assert train(tmp_path, digits, resume=False).resumed_from is None


def test_full_disk_at_a_checkpoint(
    tmp_path: Path, digits: Digits, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = checkpoint.save_resume, []

    def full_at_the_third(path: Path, found: Any) -> None:
        saved.append(found.step)
        if len(saved) == 3:
            monkeypatch.setattr(Path, "write_bytes", no_space)
        save(path, found)

    def no_space(self: Path, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "save_resume", full_at_the_third)
    with pytest.raises(OutputError, match=r"resume\.pt: No space left on device"):
        train(tmp_path, digits)
    monkeypatch.undo()
    assert load_resume(tmp_path / "resume.pt").step == 6
    assert train(tmp_path, digits, name="test_resnet").resumed_from == 6
    assert sha256(tmp_path / "last.safetensors") == sha256(undisturbed / "last.safetensors")


def test_folder_that_cannot_be_one(tmp_path: Path, digits: Digits) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        train(tmp_path / "file" / "run", digits)


class Diverging(LogitDistillationTask):
    """A distillation whose teacher term is lost in the fifth step."""

    calls = 0

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        output = super().forward(input, target)
        self.calls += 1
        if self.calls == 5:
            output["kd_loss"] = output["kd_loss"] / 0
            output["loss"] = output["loss"] + output["kd_loss"]
        return output


def test_a_loss_that_is_not_finite_stops_and_is_named(tmp_path: Path, digits: Digits) -> None:
    task = Diverging(model(), model("test_vit", img_size=16), distill_loss_weight=0.5, verbose=False)
    message = r"the term 'kd_loss' of the loss is inf at step 5.*bad-batch-step5-rank0.*gives its \"images\""
    with pytest.raises(TrainingError, match=message):
        train(tmp_path, digits, task)
    saved = load_file(tmp_path / "bad-batch-step5-rank0.safetensors")
    (expected,) = [batch for place, batch in enumerate(digits.train_batches(0, batch_size=8)) if place == 4]
    assert all(torch.equal(saved[name], value) for name, value in expected._asdict().items())
    assert [line["step"] for line in lines(tmp_path, "step")] == [1, 2, 3, 4]
    assert lines(tmp_path, "step")[0].keys() >= {"loss", "task_loss", "kd_loss"}
    assert load_resume(tmp_path / "resume.pt").step == 3


def test_training_learns(tmp_path: Path) -> None:
    plain = CONFIG.model_copy(update={"epochs": 6, "lr": 3e-3, "ema_decay": None, "evaluate_every": 6})
    result = train(tmp_path, Digits(labelled=200, image_size=16), config=plain)
    assert result.ema_accuracy is None and result.ema_weights is None
    assert result.accuracy > 0.7
