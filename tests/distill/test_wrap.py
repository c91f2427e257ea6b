"""`wrap` and the task that it makes, in the hands of a timm-style loop."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.task import TrainingTask
from torch import nn

import vmkd_fx as vx
from tests.checks import assert_is, assert_same_module, fingerprint
from tests.models import images, small
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.errors import MatchError, ModelError, RecipeError, UnknownNameError

METHODS = ("std", "std-intermediate", "hard", "kd")


def teachers(count: int = 2) -> list[nn.Module]:
    torch.manual_seed(1)
    return [timm.create_model("test_resnet", num_classes=10) for _ in range(count)]


def targets(count: int = 4) -> torch.Tensor:
    return torch.arange(count) % 10


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_training(method: str) -> None:
    student, frozen = small("mixer"), teachers()
    task = vx.wrap(student, method, frozen).train()
    assert isinstance(task, TrainingTask)
    out = task(images(4), targets())
    assert out["output"].shape == (4, 10)
    assert {"loss", "output", "class_loss", "dist_loss", f"{method}/0", f"{method}/1"} == set(out)
    torch.testing.assert_close(out["loss"], 0.5 * out["class_loss"] + out["dist_loss"])
    torch.testing.assert_close(out["dist_loss"], 0.5 * (out[f"{method}/0"] + out[f"{method}/1"]))

    out["loss"].backward()
    assert student.blocks[0].mlp_tokens.fc1.weight.grad is not None
    assert all(p.grad is None for teacher in frozen for p in teacher.parameters())


def test_what_is_given_is_left_alone() -> None:
    student, (teacher,) = small("mixer").eval(), teachers(1)
    teacher.train()
    before = fingerprint(student), fingerprint(teacher)
    task = vx.wrap(student, "std", [teacher]).train()
    task(images(4), targets())["loss"].backward()
    task.eval()
    assert_same_module(student, before[0])
    assert_same_module(teacher, before[1])


def test_a_teacher_stays_in_eval_mode_and_is_itself() -> None:
    (teacher,) = teachers(1)
    task = vx.wrap(small("mixer"), "std", [teacher]).train()
    own, given = task.teachers[0].info, task.trainable_module.info
    assert own.mean != given.mean
    x = images(3)

    def vector(values: tuple[float, ...]) -> torch.Tensor:
        return torch.tensor(values).view(-1, 1, 1)

    pixels = x * vector(given.std) + vector(given.mean)
    expected = teacher.eval()((pixels - vector(own.mean)) / vector(own.std))
    torch.testing.assert_close(task.teachers[0](x)["logits"], expected)


def test_a_teacher_of_another_fixed_size_is_fed_that_size() -> None:
    teacher = timm.create_model("deit_tiny_patch16_224", num_classes=10, img_size=64, depth=1)
    task = vx.wrap(small("mixer"), "kd", [teacher])
    assert task.teachers[0].resize == (64, 64)
    assert task(images(4), targets())["loss"].isfinite()


def test_copy_trains_a_copy() -> None:
    student = small("mixer")
    task = vx.wrap(student, "std", teachers(1), copy=True)
    assert not {id(p) for p in task.trainable_module.parameters()} & {id(p) for p in student.parameters()}


def test_strip_after_training_through_the_task() -> None:
    student = small("deit")
    task = vx.wrap(student, "std", teachers(1)).train()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        task(images(4), targets())["loss"].backward()
        optimizer.step()
    assert_is(vx.strip(task), student, images(3))


def test_the_moving_average_and_the_checkpoint() -> None:
    student = small("mixer")
    task = vx.wrap(student, "std", teachers(1)).train()
    task.setup_ema(decay=0.5)
    with torch.no_grad():
        student.head.weight.fill_(1.0)
    task.update_ema(step=2)
    average = task.get_eval_model(ema=True).eval()
    assert average(images()).shape == (2, 10)

    state = task.get_checkpoint_state(ema=True)["state_dict_ema"]
    assert torch.allclose(state["head.weight"], torch.full((10, 24), 0.5))
    plain = {key: value for key, value in state.items() if not key.startswith("vmkd.")}
    small("mixer").load_state_dict(plain, strict=True)

    again = vx.wrap(small("mixer"), "std", teachers(1))
    again.load_checkpoint_state(task.get_checkpoint_state()["state_dict"])
    assert torch.equal(again.trainable_module.head.weight, student.head.weight)


def test_predictions_of_the_eval_model() -> None:
    task = vx.wrap(small("mixer"), "std", teachers()).eval()
    x = images()
    outputs = task.trainable_module(x)
    dist = (outputs["std/0"] + outputs["std/1"]) / 2
    torch.testing.assert_close(task.get_eval_model()(x), outputs["logits"])
    torch.testing.assert_close(task.get_eval_model(predict="dist")(x), dist)
    torch.testing.assert_close(task.get_eval_model(predict="mean")(x), (outputs["logits"] + dist) / 2)


def test_timms_evaluator_takes_it() -> None:
    task = vx.wrap(small("mixer"), "std", teachers(1)).eval()
    evaluator = task.create_evaluator()
    evaluator.update(task.get_eval_model()(images(4)), targets())
    assert 0 <= evaluator.compute()["top1"] <= 100


def test_a_task_is_copied_whole() -> None:
    task = vx.wrap(small("mixer"), "std", teachers(1)).eval()
    twin = copy.deepcopy(task)
    assert torch.equal(twin(images(4), targets())["loss"], task(images(4), targets())["loss"])


def test_the_task_compiles() -> None:
    task = vx.wrap(small("mixer"), "std", teachers(1)).eval()
    expected = task(images(4), targets())["loss"]
    task.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(task(images(4), targets())["loss"], expected)
    assert_is(vx.strip(task), vx.strip(task), images())


def test_a_model_like_and_a_task_are_taken_alike() -> None:
    task = vx.wrap(vx.trace(small("mixer")), "std", teachers(1)[0])
    assert isinstance(task, DistillationTask)
    assert vx.trace(task).receipts
    assert vx.anatomy(task).blocks


def test_an_unknown_method_and_setting() -> None:
    with pytest.raises(UnknownNameError, match="no method 'sdt'; did you mean 'std'"):
        vx.wrap(small("mixer"), "sdt", teachers(1))
    with pytest.raises(RecipeError, match="no setting 'alpah'; did you mean 'alpha'"):
        vx.wrap(small("mixer"), "std", teachers(1), alpah=0.5)


def test_no_teacher() -> None:
    with pytest.raises(RecipeError, match="needs a teacher"):
        vx.wrap(small("mixer"), "std")


def test_an_unknown_teacher() -> None:
    with pytest.raises(UnknownNameError, match="teacher: there is no timm model 'resnet5'; did you mean"):
        vx.wrap(small("mixer"), "std", ["resnet5"])
    with pytest.raises(ModelError, match="a teacher is a module or the name of a timm model, got int"):
        vx.wrap(small("mixer"), "std", [5])


def test_other_classes() -> None:
    other = timm.create_model("test_resnet", num_classes=7)
    with pytest.raises(ModelError, match="test_resnet knows 7 classes and student MlpMixer 10"):
        vx.wrap(small("mixer"), "std", [other])
    with pytest.raises(ModelError, match="resnet50 knows 1000 classes and student MlpMixer 10"):
        vx.wrap(small("mixer"), "std", ["resnet50"])


def test_a_teacher_that_does_not_say_its_classes_is_asked() -> None:
    other = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))
    with pytest.raises(ModelError, match="Sequential knows 7 classes"):
        vx.wrap(small("mixer"), "std", [other])


def test_an_injection_that_matches_nothing() -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(MatchError, match="Sequential has no blocks with token features"):
        vx.wrap(student, "std", teachers(1), input_size=(3, 32, 32))


def test_a_student_without_logits() -> None:
    with pytest.raises(ModelError, match="a classifier returns"):
        vx.wrap(nn.Sequential(nn.Conv2d(3, 4, 3)), "hard", teachers(1), input_size=(3, 32, 32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_teacher_of_another_precision(dtype: torch.dtype) -> None:
    task = vx.wrap(small("mixer"), "kd", [vx.trace(teachers(1)[0]).to(dtype)])
    assert task.teachers[0](images(4))["logits"].dtype == torch.float32
    assert task(images(4), targets())["loss"].isfinite()


def test_one_channel() -> None:
    student, teacher = (timm.create_model(n, num_classes=10, in_chans=1) for n in ("test_vit", "test_resnet"))
    task = vx.wrap(student, "std", [teacher])
    out = task(torch.randn(2, 1, *task.trainable_module.info.input_size[1:]), targets(2))
    assert out["loss"].isfinite()


def test_a_student_without_a_classifier_is_refused() -> None:
    with pytest.raises(ModelError, match="made without a classifier"):
        vx.wrap(small("deit", num_classes=0), "kd", teachers=[small("mixer")])
