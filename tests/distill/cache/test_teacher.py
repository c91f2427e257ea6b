"""Training from a cache: what the live teacher would say, whoever asks for whichever batch, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vmkd_fx as vx
from tests.distill.cache.recipes import images_of, live_teacher, recipe, weights
from tests.distill.data.pictures import make_folders
from vmkd_fx.distill.cache import write
from vmkd_fx.distill.cache.teacher import CachedTeacher
from vmkd_fx.distill.cache.write import CacheSettings, cache_teachers
from vmkd_fx.distill.data import Batch
from vmkd_fx.distill.losses import SoftDistillation
from vmkd_fx.distill.recipe import Recipe, TeacherConfig
from vmkd_fx.distill.train import make_task, train
from vmkd_fx.errors import CacheError

MIXED = {"mixing": {"mixup": 0.8, "cutmix": 1.0}}
WHOLE = CacheSettings(top_k=None, dtype="float32")


def cached(given: Recipe, folder: Path, settings: CacheSettings = WHOLE) -> CachedTeacher:
    cache_teachers(given, folder, settings, progress=False)
    return CachedTeacher(folder)


def batches(given: Recipe, epoch: int, **how: Any) -> list[Batch]:
    return list(images_of(given).train_batches(epoch, seed=given.train.seed, **how))


@pytest.mark.parametrize("data", [{}, MIXED], ids=["plain", "mixed"])
def test_any_epoch_start_batch_size_and_world_gets_the_live_teachers_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]
) -> None:
    monkeypatch.setattr(write, "_MOST_ROWS", 16)
    given = recipe(tmp_path, data=data)
    teacher, live = cached(given, tmp_path / "cache"), live_teacher(given)
    hows: list[tuple[int, dict[str, Any]]] = [
        (2, {"batch_size": 30}),
        (0, {"batch_size": 90}),
        (1, {"batch_size": 12, "start_batch": 3}),
        *((1, {"batch_size": 24, "rank": rank, "world_size": 2}) for rank in (1, 0)),
    ]
    for epoch, how in hows:
        for images, _, indices in batches(given, epoch, **how):
            found = teacher(images, indices, epoch)["logits"]
            # A convolution of another number of images rounds in another order.
            torch.testing.assert_close(found, live(images)["logits"], rtol=0, atol=1e-5)


def test_a_folder_of_photos_with_all_that_is_done_to_them(tmp_path: Path) -> None:
    make_folders(tmp_path / "photos", classes=2, train=10, val=2)
    data = {
        "name": "folder",
        "root": str(tmp_path / "photos"),
        "image_size": 32,
        "augmentation": {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5},
        "repeats": 2,
        "labelled": 200,
        **MIXED,
    }
    teachers = [{"model": "test_resnet", "options": {"num_classes": 7}, "classes": [6, 3]}]
    given = recipe(tmp_path, data=data, teachers=teachers)
    teacher = cached(given, tmp_path / "cache")
    torch.manual_seed(given.train.seed)  # the teacher has no checkpoint
    live = live_teacher(given)
    for epoch, how in ((0, {"batch_size": 8}), (2, {"batch_size": 4, "rank": 1, "world_size": 2})):
        for images, targets, indices in batches(given, epoch, **how):
            assert targets.shape == (len(images), 2)
            found = teacher(images, indices, epoch)["logits"]
            torch.testing.assert_close(found, live(images)["logits"], rtol=0, atol=1e-5)


def losses(given: Recipe) -> dict[tuple[int, str], float]:
    """Every loss term of every step of a training."""
    train(given, progress=False)
    lines = [json.loads(line) for line in (Path(given.out) / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert len(steps) == 6
    return {(line["step"], key): line[key] for line in steps for key in line if "loss" in key or "/" in key}


def test_a_training_has_the_losses_of_the_live_teacher(tmp_path: Path) -> None:
    changes = {
        "data": {"labelled": 60, **MIXED},
        "train": {"epochs": 2, "batch_size": 20, "evaluate_every": 2},
        "method": "kd+nkd",
    }
    given = recipe(tmp_path, **changes)
    expected = losses(given)
    assert expected.keys() > {(6, "kd/0"), (6, "nkd/0"), (6, "loss")}
    cache_teachers(given, tmp_path / "cache", WHOLE, progress=False)
    teachers = [{"cache": str(tmp_path / "cache")}]
    found = losses(recipe(tmp_path, **changes, teachers=teachers, out=str(tmp_path / "other")))
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in expected) <= 1e-6


@pytest.mark.parametrize("settings", [CacheSettings(top_k=3), CacheSettings(top_k=None)])
def test_the_losses_of_a_shortened_or_rounded_cache(tmp_path: Path, settings: CacheSettings) -> None:
    # So sure a teacher that three classes of ten have 0.9999 of its mass.
    weights(tmp_path / "teacher.safetensors", sure=2000)
    given = recipe(tmp_path)
    teacher, live = cached(given, tmp_path / "cache", settings), live_teacher(given)
    assert teacher.folder.manifest.form.top_k == settings.top_k
    images, _, indices = batches(given, 1, batch_size=90)[0]
    student = torch.randn(90, 10, generator=torch.Generator().manual_seed(0))
    loss = SoftDistillation(1.0)
    found = [loss(student, out["logits"]).mean() for out in (teacher(images, indices, 1), live(images))]
    assert 0 < abs(found[0] - found[1]) <= 1e-3


def test_two_teachers_of_which_one_is_cached(tmp_path: Path) -> None:
    other = str(weights(tmp_path / "other.safetensors", seed=2))
    both = [*recipe(tmp_path).model_dump()["teachers"], {"model": "test_resnet", "checkpoint": other}]
    given = recipe(tmp_path, teachers=both)
    cache_teachers(given, tmp_path / "cache", WHOLE, progress=False)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["0-test_resnet", "1-test_resnet"]
    with pytest.raises(ValueError, match="dtype would change nothing: a cache without a model is taken as"):
        recipe(tmp_path, teachers=[{"cache": "somewhere", "dtype": "float16"}])
    mixed = recipe(tmp_path, teachers=[both[0], {"cache": str(tmp_path / "cache")}])
    tasks = [make_task(one, images_of(one)).eval() for one in (given, mixed)]
    assert [type(teacher).__name__ for teacher in tasks[1].teachers] == ["Teacher", "CachedTeacher"]
    batch = batches(given, 1, batch_size=30)[0]
    outs = []
    for task in tasks:
        task.set_epoch(1)
        outs.append(
            [one["logits"] for one in (task._said(t, batch.images, batch.indices) for t in task.teachers)]
        )
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-6)
    assert not torch.allclose(outs[0][0], outs[0][1])


def test_features_come_from_the_cache(tmp_path: Path) -> None:
    method, student = "vitkd", {"model": "deit_tiny_patch16_224", "options": {"depth": 3, "embed_dim": 24}}
    size = {"img_size": 16, "patch_size": 4}
    student["options"] |= {"num_heads": 2, **size}
    options = {**size, "depth": 3, "embed_dim": 32, "num_heads": 2}
    teachers = [{"model": "deit_tiny_patch16_224", "options": options}]
    given = recipe(tmp_path, student=student, teachers=teachers, method=method, data={"labelled": 20})
    torch.manual_seed(given.train.seed)
    settings = CacheSettings(top_k=None, dtype="float32", features=True, epochs=range(1))
    cache_teachers(given, tmp_path / "cache", settings, progress=False)
    torch.manual_seed(given.train.seed)
    data = images_of(given)
    live = make_task(given, data)
    torch.manual_seed(given.train.seed)
    teachers = [{"cache": str(tmp_path / "cache")}]
    other = make_task(recipe(tmp_path, **{**sections(given), "teachers": teachers}), data)
    other.trainable_module.load_state_dict(live.trainable_module.state_dict())
    batch = batches(given, 0, batch_size=20)[0]
    found = []
    for task in (live.eval(), other.eval()):
        task.set_epoch(0)
        torch.manual_seed(0)  # vitkd masks at random
        found.append(task(batch.images, batch.targets, batch.indices))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-6, atol=1e-6, msg=key)


def sections(given: Recipe) -> dict[str, Any]:
    content = given.model_dump()
    return {"student": content["student"], "method": content["method"], "data": {"labelled": 20}} | {
        "train": {"epochs": 1}
    }


def test_what_a_cache_cannot_give_is_refused(tmp_path: Path) -> None:
    given = recipe(tmp_path, data={"labelled": 20})
    cached(given, tmp_path / "cache")
    teachers = [{"cache": str(tmp_path / "cache")}]

    def refused(message: str, **changes: Any) -> None:
        changed = recipe(tmp_path, **{"data": {"labelled": 20}, "teachers": teachers, **changes})
        with pytest.raises(CacheError, match=message):
            make_task(changed, images_of(changed))

    refused("is a cache of other images: seed was 3 and is 9", train={"seed": 9})
    refused(
        "cache of other images: data.augment was True and is False", data={"labelled": 20, "augment": False}
    )
    refused(r"lacks 2 of the 5 files of 5 epochs, the first in epoch 3.*--epochs 3:5", train={"epochs": 5})
    refused("there is no cache .*elsewhere", teachers=[{"cache": str(tmp_path / "elsewhere")}])
    refused(r"holds logits alone, and the method reads features", method="fitnet")
    other = str(weights(tmp_path / "other.safetensors", seed=2))
    named = {"model": "test_resnet", "cache": str(tmp_path / "cache")}
    refused(r"cache of another teacher: weights was \w+ and is", teachers=[{**named, "checkpoint": other}])
    own = {**named, "checkpoint": str(tmp_path / "teacher.safetensors")}
    refused(
        r"another teacher: .*dtype was .float32. and is .bfloat16.", teachers=[{**own, "dtype": "bfloat16"}]
    )
    right = recipe(tmp_path, data={"labelled": 20}, teachers=[own])
    assert isinstance(make_task(right, images_of(right)).teachers[0], CachedTeacher)
    with pytest.raises(CacheError, match="holds what test_resnet said and not its weights"):
        CachedTeacher(tmp_path / "cache").model.state_dict()


def test_images_that_the_teacher_did_not_see_are_refused(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    teacher = cached(given, tmp_path / "cache")
    images, _, indices = batches(given, 1, batch_size=30)[0]
    with pytest.raises(CacheError, match=r"images of epoch 2, sample \d+ first, are not those"):
        teacher(images, indices, 2)
    with pytest.raises(CacheError, match=r"(30|2\d) of 30 images"):
        teacher(images.flip(-1), indices, 1)
    with pytest.raises(CacheError, match="has no row for sample 95 in epoch 1: it is of other images, 90"):
        teacher(images, torch.cat([indices[:-1], torch.tensor([95])]), 1)
    with pytest.raises(CacheError, match="--epochs 7:8 adds it"):
        teacher(images, indices, 7)
    for missing in ((images,), (images, indices)):
        with pytest.raises(
            CacheError, match=r"call task.set_epoch\(epoch\) before each epoch and task\(images"
        ):
            teacher(*missing)


def test_in_ones_own_loop(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    teacher = cached(given, tmp_path / "cache")
    student = make_task(given, images_of(given)).get_eval_model().student
    teacher.compile(fullgraph=True)  # there is nothing to compile, and what there is stays as it is
    task = vx.wrap(vx.strip(student), "kd", teacher)
    for epoch in (0, 2):
        task.set_epoch(epoch)
        images, targets, indices = batches(given, epoch, batch_size=45)[1]
        out = task(images, targets, indices)
        out["loss"].backward()
        assert out["kd/0"].isfinite()


def test_what_learns_beside_the_student_begins_as_with_the_live_teacher(tmp_path: Path) -> None:
    """Making a live teacher draws random numbers, and reading a cache does not."""
    given = recipe(tmp_path, method="std", data={"labelled": 20}, train={"epochs": 1, "batch_size": 10})
    cache_teachers(given, tmp_path / "cache", WHOLE, progress=False)
    starts = []
    for one in (
        given,
        given.model_copy(update={"teachers": (TeacherConfig(cache=str(tmp_path / "cache")),)}),
    ):
        torch.manual_seed(one.train.seed)
        starts.append(make_task(one, images_of(one)).trainable_module.state_dict())
    live, other = starts
    assert live.keys() == other.keys() and any(key.startswith("vmkd.std") for key in live)
    assert all(torch.equal(live[key], other[key]) for key in live)
