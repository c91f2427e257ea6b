"""Teachers that run in their own manner: precision, image size, classes, compiled, and where they stay."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from tests.models import images, small
from vmkd_fx.distill.recipe import Recipe
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.distill.teacher_spec import TeacherSpec
from vmkd_fx.distill.train import make_task
from vmkd_fx.errors import ModelError, UnknownNameError


def resnet(classes: int = 10) -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=classes).eval()


def task_of(teacher: nn.Module | TeacherSpec, method: str = "kd") -> DistillationTask:
    return vx.wrap(small("mixer"), method, teacher).train()


def logits(teacher: nn.Module | TeacherSpec, x: torch.Tensor) -> torch.Tensor:
    return task_of(teacher).teachers[0](x)["logits"]


def test_half_precision_leaves_the_given_model_alone_and_answers_in_the_images_precision() -> None:
    model, x = resnet(), images(3)
    task = task_of(TeacherSpec(model, dtype="bfloat16"))
    teacher = task.teachers[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert teacher.scale.dtype == torch.float32
    found, expected = teacher(x)["logits"], logits(model, x)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
    # Neither a change of the task's precision nor autocast reaches it.
    task.to(torch.float64)
    assert teacher.dtype == torch.bfloat16
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(teacher(x)["logits"], found, rtol=0, atol=0)


def test_without_a_precision_of_its_own_it_goes_with_the_task() -> None:
    task = task_of(resnet()).to(torch.float64)
    teacher = task.teachers[0]
    assert teacher.dtype == torch.float64
    assert teacher(images(2, dtype=torch.float64))["logits"].dtype == torch.float64


def test_images_are_resized_where_asked_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, x = resnet(), images(3)
    with caplog.at_level(logging.INFO):
        task = task_of(TeacherSpec(model, image_size=48))
    assert "teacher test_resnet: the student's images of 32 x 32 are resized to 48 x 48 for it" in caplog.text
    same = task_of(model).teachers[0]
    larger = nn.functional.interpolate(x * same.scale + same.shift, (48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(task.teachers[0](x)["logits"], model(larger))
    vit = timm.create_model("deit_tiny_patch16_224", num_classes=10, img_size=64, depth=1)
    with pytest.raises(ModelError, match=r"takes images of 64 x 64 and image_size is 48; leave it out"):
        task_of(TeacherSpec(vit, image_size=48))


def test_a_teacher_of_more_classes_teaches_those_of_the_student() -> None:
    classes = (4, 19, 0, 7, 8, 2, 11, 12, 13, 14)
    model, x = resnet(20), images(3)
    torch.testing.assert_close(
        logits(TeacherSpec(model, classes=classes), x),
        task_of_any(model).teachers[0](x)["logits"][:, list(classes)],
    )
    out = task_of(TeacherSpec(model, classes=classes), "dkd")(x, torch.arange(3))
    assert out["loss"].isfinite()
    with pytest.raises(
        ModelError, match=r"test_resnet knows 20 classes .* say which of the teacher's they are"
    ):
        task_of(model)
    with pytest.raises(ModelError, match="the class map of a teacher has 3 classes and student MlpMixer 10"):
        task_of(TeacherSpec(model, classes=(1, 2, 3)))


def task_of_any(model: nn.Module) -> DistillationTask:
    student = small("mixer", num_classes=20)
    return vx.wrap(student, "kd", model)


def test_features_and_logits_of_a_mapped_half_precision_teacher_come_from_one_forward() -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    model = timm.create_model("deit_tiny_patch16_224", num_classes=20, **options)
    spec = TeacherSpec(model, classes=range(10), dtype="bfloat16")
    task = vx.wrap(small("deit"), "vitkd+nkd", spec).train()
    runs = []
    task.teachers[0].model.register_forward_hook(lambda *_: runs.append(1))
    out = task(images(4), torch.arange(4))
    assert len(runs) == 1
    assert out["loss"].isfinite() and out["output"].dtype == torch.float32


def test_compiled_and_copied() -> None:
    x = images(2)
    plain, asked = task_of(resnet()), task_of(TeacherSpec(resnet(), compile=True))
    assert asked.teachers[0]._compiled_call_impl is not None
    assert plain.teachers[0]._compiled_call_impl is None
    # A copy is not compiled, and says the same.
    torch.testing.assert_close(copy.deepcopy(asked).teachers[0](x)["logits"], plain.teachers[0](x)["logits"])


def test_where_it_stays_is_checked_and_kept() -> None:
    with pytest.raises(ModelError, match=r"device cuda:99 was asked for, and torch finds \d+ CUDA devices"):
        TeacherSpec(resnet(), device="cuda:99")
    with pytest.raises(ModelError, match="'gpu' is no device"):
        TeacherSpec(resnet(), device="gpu")
    with pytest.raises(UnknownNameError, match="teacher: there is no dtype 'half'"):
        TeacherSpec(resnet(), dtype="half")
    task = task_of(TeacherSpec(resnet(), device="cpu"))
    task.to("meta")
    assert {p.device.type for p in task.teachers[0].parameters()} == {"cpu"}
    assert {p.device.type for p in task.trainable_module.parameters()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_student_here_and_a_teacher_there() -> None:
    model, x = resnet(), images(3)
    task = task_of(TeacherSpec(model, device="cuda:0"))
    found = task.teachers[0](x)["logits"]
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, logits(model, x), rtol=1e-3, atol=1e-3)
    out = task.to("cpu")(x, torch.arange(3))
    assert out["loss"].isfinite() and next(task.teachers[0].parameters()).is_cuda


def test_a_recipe_says_how_a_teacher_is_run(tmp_path: Path) -> None:
    numbers = tmp_path / "map.txt"
    numbers.write_text("\n".join(map(str, range(10, 20))))
    first = {"model": "test_resnet", "options": {"num_classes": 20}, "classes": str(numbers)}
    second = {"model": "test_byobnet", "dtype": "bfloat16", "image_size": 32, "device": "cpu"}
    recipe = Recipe.model_validate(
        {
            "student": {"model": "mixer_nano_32", "options": {"img_size": 16, "num_blocks": 1}},
            "teachers": [first, second],
            "method": "kd",
            "data": {"name": "digits", "labelled": 20, "image_size": 16},
            "out": str(tmp_path / "run"),
        }
    )
    from vmkd_fx.distill.data import open_data

    task = make_task(recipe, open_data(**recipe.data.model_dump()))
    mapped, half = task.teachers
    assert mapped.classes.tolist() == list(range(10, 20))
    assert (half.dtype, half.resize, half.stays) == (torch.bfloat16, (32, 32), True)
    out = task(images(4, size=16), torch.arange(4))
    assert out["kd/0"].isfinite() and out["kd/1"].isfinite()
    # How it runs is no part of what is trained; its precision is.
    changed = recipe.model_copy(update={"teachers": (recipe.teachers[0], _with(recipe, device=None))})
    assert changed.digest() == recipe.digest()
    changed = recipe.model_copy(update={"teachers": (recipe.teachers[0], _with(recipe, dtype=None))})
    assert changed.digest() != recipe.digest()


def _with(recipe: Recipe, **changes: object) -> object:
    return recipe.teachers[1].model_copy(update=changes)
