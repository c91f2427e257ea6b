from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.task import ClassificationTask

import vmkd_fx as vx
from tests.distill.run_folders import lines
from vmkd_fx.distill.checkpoint import load_resume
from vmkd_fx.distill.data import Digits
from vmkd_fx.distill.evaluate import accuracy
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.trainer import fit
from vmkd_fx.distill.training import signals, validation
from vmkd_fx.distill.training.precision import Precision
from vmkd_fx.distill.training.validation import Validation
from vmkd_fx.distill.training.world import World
from vmkd_fx.errors import TrainingStoppedError

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=1, batch_size=10, ema_decay=0.9)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(labelled=30, image_size=16)


@pytest.fixture(scope="module")
def teacher(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """One that knows its digits."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    config = TrainConfig(epochs=6, batch_size=25, lr=3e-3, evaluate_every=6, evaluate_first=False)
    data = Digits(labelled=200, image_size=16)
    out = tmp_path_factory.mktemp("teacher")
    task = ClassificationTask(model, verbose=False)
    assert fit(task, data, config, out, digest="t", progress=False).accuracy > 0.6
    return model.eval()


class Turned(torch.nn.Module):
    """A teacher whose classes are in another order."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.num_classes = model, 10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).roll(3, dims=1)


def test_everyone_is_judged_before_the_first_step(
    tmp_path: Path, digits: Digits, teacher: torch.nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    student = timm.create_model("test_vit", num_classes=10, img_size=16)
    task = vx.wrap(student, "kd", [teacher, Turned(teacher)], input_size=(3, 16, 16))
    fit(task, digits, CONFIG, tmp_path, digest="d", progress=False)
    (line,) = lines(tmp_path, "before")
    right, wrong = line["teachers"]
    assert line["step"] == 0 and line["ema_accuracy"] == line["accuracy"] < 0.3
    # The student's mean and deviation are ImageNet's, so are the teacher's: it sees the images as they are.
    assert right["accuracy"] == pytest.approx(accuracy(teacher, digits)) and right["accuracy"] > 0.6
    assert wrong["accuracy"] < 0.2
    said = capsys.readouterr().err
    assert "teacher Turned is right on" in said and "guessing among 10 classes on 10.00 %" in said
    assert right["model"] not in said


def test_several_processes_share_the_images_out(digits: Digits, teacher: torch.nn.Module) -> None:
    """The parts of three processes, added up, are the count of one."""
    seen, right = 0, 0
    for rank in range(3):
        for images, targets, _ in digits.validation_batches(rank=rank, world_size=3):
            seen, right = seen + len(targets), right + int((teacher(images).argmax(1) == targets).sum())
    assert right / seen == pytest.approx(accuracy(teacher, digits))


@pytest.mark.parametrize("when", ["before", "epoch"])
def test_a_stop_while_images_are_judged(
    tmp_path: Path, digits: Digits, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained is saved, and judged when it goes on."""
    config = CONFIG.model_copy(update={"evaluate_first": when == "before"})

    def make() -> ClassificationTask:
        torch.manual_seed(0)
        return ClassificationTask(timm.create_model("test_vit", num_classes=10, img_size=16), verbose=False)

    class Asked(signals.Stop):
        """Asked for once images are judged."""

        @property
        def asked(self) -> bool:
            return self.judging

        judging = False

    def judge(self: Validation, ema: bool = False) -> float:
        Asked.judging = True
        return student(self, ema)

    student = Validation.student
    with monkeypatch.context() as patched:
        patched.setattr(validation.Validation, "student", judge)
        patched.setattr(signals, "Stop", Asked)
        with pytest.raises(TrainingStoppedError, match="with everything saved; start it again to go on"):
            fit(make(), digits, config, tmp_path / "stopped", digest="d", progress=False)
    steps = 0 if when == "before" else 3
    state = load_resume(tmp_path / "stopped" / "resume.pt")
    assert (state.step, state.batch, state.scores) == (steps, steps, {})
    assert not lines(tmp_path / "stopped", when)
    found = fit(make(), digits, config, tmp_path / "stopped", digest="d", progress=False)
    whole = fit(make(), digits, config, tmp_path / "whole", digest="d", progress=False)
    assert (found.accuracy, found.ema_accuracy) == (whole.accuracy, whole.ema_accuracy)
    assert lines(tmp_path / "stopped", when) == lines(tmp_path / "whole", when)


def test_the_mode_is_put_back(digits: Digits) -> None:
    task = ClassificationTask(timm.create_model("test_vit", num_classes=10, img_size=16), verbose=False)
    task.train()
    Validation(task, digits, World(CPU), Precision(None, CPU), signals.Stop()).student()
    assert task.trainable_module.training


@pytest.mark.parametrize(
    ("classes", "accuracy", "named"),
    [(2, 0.93, False), (2, 0.52, True), (1000, 0.12, False), (1000, 0.02, True), (10, None, False)],
)
def test_a_teacher_that_hardly_knows_better_than_guessing_is_named(
    classes: int, accuracy: float | None, named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    validation.warn_of_teachers([{"model": "big", "accuracy": accuracy}], classes)
    assert ("teacher big is right on" in capsys.readouterr().err) is named
