"""RIFormer: affines for mixers, a teacher imitated in windows of epochs, merged when lowered."""

from __future__ import annotations

import pytest
import timm
import torch

import vmkd_fx as vx
from tests.distill.methods.pairs import Pair
from tests.models import images, small
from vmkd_fx.distill.methods.pairs import partner, spread
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.errors import RecipeError
from vmkd_fx.graph.replace import replacements
from vmkd_fx.graph.verify import randomise_
from vmkd_fx.models import register

PAIR = Pair("riformer", "poolformer", ("poolformer",), {"layers": 2})


def step(task: DistillationTask) -> dict[str, torch.Tensor]:
    size = task.trainable_module.info.need_input_size()
    return task(images(2, size[1]), torch.arange(2))


def test_terms_count_in_their_epochs() -> None:
    task = PAIR.wrap().train()
    for epoch, features, relations in (
        (0, True, True),
        (1, True, True),
        (2, True, False),
        (7, True, False),
        (8, False, False),
    ):
        task.set_epoch(epoch)
        out = step(task)
        assert [bool(out[f"riformer/{term}"] != 0) for term in ("input", "output", "relation")] == [
            features,
            features,
            relations,
        ]
        torch.testing.assert_close(
            out["loss"], sum(out[f"riformer/{term}"] for term in ("soft", "input", "output", "relation"))
        )


def test_every_projection_has_a_gradient_in_every_epoch() -> None:
    task = PAIR.wrap(teachers=[small("poolformer", dims=(16, 24, 32, 48))], teacher_weights=False).train()
    task.set_epoch(11)
    step(task)["loss"].backward()
    assert [name for name, p in task.trainable_module.named_parameters() if p.grad is None] == []


def test_without_an_epoch_it_does_not_start() -> None:
    task = vx.wrap(small("poolformer"), "riformer", [small("poolformer")], layers=2, epochs=12)
    with pytest.raises(RecipeError, match=r"call task.set_epoch\(epoch\)"):
        step(task)
    with pytest.raises(RecipeError, match=r"say how long that is, wrap\(..., epochs=120\)"):
        vx.wrap(small("poolformer"), "riformer", [small("poolformer")], layers=2)


def test_it_starts_from_its_teacher_but_for_the_mixers() -> None:
    teacher = small("poolformer")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1
    task = PAIR.wrap(teachers=[teacher])
    student, given = task.trainable_module, teacher.state_dict()
    same = [
        name
        for name, value in student.state_dict().items()
        if name in given and torch.equal(value, given[name])
    ]
    assert set(same) == set(given)
    kept = PAIR.wrap(teachers=[teacher], teacher_weights=False).trainable_module
    assert not torch.equal(kept.state_dict()["head.fc.weight"], given["head.fc.weight"])


def test_an_imitator_of_itself_has_nothing_to_learn() -> None:
    student = small("poolformer").eval()
    task = vx.wrap(student, "riformer", [student], layers=4, replace=False, epochs=12).eval()
    task.set_epoch(0)
    out = step(task)
    assert all(out[f"riformer/{term}"] == 0 for term in ("soft", "input", "output", "relation"))


def test_the_affines_are_gone_after_lowering() -> None:
    task = PAIR.wrap()
    randomise_(task.trainable_module)
    lowered = vx.lower(task)
    assert not [name for name in lowered.state_dict() if "token_mixer" in name]


def test_layers_are_spread_over_the_stages() -> None:
    with torch.device("meta"):
        student = vx.anatomy(timm.create_model("poolformer_s12"))
        teacher = vx.anatomy(timm.create_model("poolformer_s24"))
    assert spread(student, 4) == (1, 3, 9, 11)
    assert spread(student, 6) == (1, 3, 5, 7, 9, 11)
    assert spread(student, 2) == (3, 11)
    assert [partner(student, index, teacher) for index in (1, 3, 9, 11)] == [3, 7, 19, 23]


def test_a_student_without_mixers_keeps_what_it_has() -> None:
    register()
    student = timm.create_model("riformer_s12", num_classes=10)
    task = vx.wrap(student, "riformer", [timm.create_model("poolformer_s12", num_classes=10)], epochs=12)
    assert not replacements(task.trainable_module)
    assert vx.strip(task).state_dict().keys() == student.state_dict().keys()
