"""Several methods train one student, and what cannot be is said before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from tests.distill.methods.pairs import resnet, vit
from tests.models import images, small
from vmkd_fx.distill.methods import resolve, resolve_all
from vmkd_fx.distill.recipe import Recipe
from vmkd_fx.errors import MatchError, ModelError, RecipeError, UnknownNameError


def terms(task: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in task(images(4), torch.arange(4)).items() if "/" in name}


def test_a_circulant_mixer_with_tokens_nkd_and_two_teachers() -> None:
    methods = [resolve("ccs", {"groups": 4}), "std", "nkd"]
    task = vx.wrap(small("mixer"), methods, [resnet(), vit()]).eval()
    assert set(terms(task)) == {"std/0", "std/1", "nkd/0", "nkd/1"}
    plain = vx.strip(task)
    assert plain.get_submodule("blocks.0.mlp_tokens").weight.shape == (4, 16)
    assert not [name for name in plain.state_dict() if name.startswith("vmkd.")]


def test_each_term_is_what_its_method_alone_gives() -> None:
    torch.manual_seed(0)
    student, teachers = vit(embed_dim=24).eval(), [vit()]
    together = terms(vx.wrap(student, "nkd+dkd", teachers).eval())
    for name in ("nkd", "dkd"):
        alone = terms(vx.wrap(student, name, teachers).eval())
        assert torch.equal(alone[f"{name}/0"], together[f"{name}/0"])


def test_the_smallest_share_of_the_labels_counts() -> None:
    task = vx.wrap(small("mixer"), [resolve("kd", {"alpha": 0.75}), "nkd"], [resnet()]).eval()
    out = task(images(4), torch.arange(4))
    torch.testing.assert_close(out["loss"], 0.25 * out["class_loss"] + out["dist_loss"])
    torch.testing.assert_close(out["dist_loss"], 0.75 * out["kd/0"] + out["nkd/0"])


def test_a_setting_goes_to_the_one_method_that_has_it() -> None:
    first, second = resolve_all("vitkd+nkd", {"generator": "self_attention", "gamma": 1.0})
    assert (first.name, first.generator) == ("vitkd", "self_attention")  # type: ignore[attr-defined]
    assert (second.name, second.gamma) == ("nkd", 1.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("methods", "settings", "message"),
    [
        (
            "std+kd",
            {"alpha": 0.5},
            "setting 'alpha' belongs to 'std', 'kd' of std \\+ kd; give the methods as a",
        ),
        ("vitkd+nkd", {"groups": 4}, "setting 'groups' belongs to none of the methods of vitkd \\+ nkd"),
        ("std+std", {}, "'std' is there twice"),
        ("std+std-intermediate", {}, "'std' and 'std-intermediate' are of one kind"),
        ([], {}, "no method was given"),
        ("std+nkt", {}, "no method 'nkt'; did you mean 'nkd'"),
    ],
)
def test_methods_that_cannot_be_together(methods: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((RecipeError, UnknownNameError), match=message):
        resolve_all(methods, settings)


def test_features_alone_need_no_common_classes() -> None:
    teacher = vit(num_classes=0)
    assert terms(vx.wrap(vit(embed_dim=24), "vitkd", [teacher]).train())["vitkd/generation"].isfinite()
    with pytest.raises(ModelError, match="knows 7 classes"):
        vx.wrap(vit(embed_dim=24), "vitkd+nkd", [vit(num_classes=7)])


@pytest.mark.parametrize(
    ("student", "method", "teachers", "settings", "error", "message"),
    [
        ("deit", "ccs", 0, {"groups": 4}, MatchError, "token"),
        ("mixer", "ccs", 0, {"groups": 5}, (MatchError, RecipeError, ModelError), "5"),
        (
            "mixer",
            "ccs",
            0,
            {"groups": 4, "initialise": "project"},
            (MatchError, RecipeError),
            "GELU|nonlinear|two",
        ),
        ("mixer", "vitkd", 0, {}, RecipeError, "needs a teacher"),
        ("mixer", "vitkd", 1, {"teacher": 1}, RecipeError, "teacher=1, and there are 1"),
        ("mixer", "vitkd", 1, {"ratio": 0.99}, RecipeError, "leaves no token"),
        ("mixer", "vitkd", 1, {"ratio": 0.0}, RecipeError, "mask ratio"),
        ("mixer", "vitkd", 1, {"shallow": (0, 7)}, MatchError, "no block 7"),
        ("mixer", "deit", 1, {}, MatchError, "mean of a class and a distillation head"),
        ("gmlp", "riformer", 1, {}, MatchError, "no branch is left for the channels"),
        (
            "poolformer",
            "riformer",
            1,
            {"feature_epochs": 13},
            RecipeError,
            "13 and the training has 12 epochs",
        ),
        ("poolformer", "riformer", 1, {"layers": 9}, MatchError, "4 blocks in its stages, and 9"),
        ("poolformer", "riformer", 1, {}, MatchError, "compares location by location"),
        ("mixer", "mgd", 1, {"ratio": 1.0}, RecipeError, "leaves nothing"),
        ("mixer", "nkd", 1, {"temperature": 0}, RecipeError, "above 0"),
        ("mixer", "std", 1, {"positions": [9]}, MatchError, "no block 9"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    student: str, method: str, teachers: int, settings: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        vx.wrap(small(student), method, [vit() for _ in range(teachers)], epochs=12, **settings)


def test_a_recipe_of_a_dozen_lines() -> None:
    recipe = Recipe.model_validate(
        {
            "student": {"model": "mixer_nano_32"},
            "teachers": [{"model": "test_resnet"}, {"model": "test_vit"}],
            "method": [{"preset": "ccs", "groups": 4}, "std", {"preset": "nkd", "gamma": 1.0}],
            "out": "run",
        }
    )
    assert [method.preset for method in recipe.method] == ["ccs", "std", "nkd"]
    assert recipe.method[0].overrides == {"groups": 4}


def test_a_teacher_without_blocks_cannot_be_read() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(MatchError, match="no blocks"):
        vx.wrap(vit(), "vitkd", [flat])


def test_resized_features_are_said(caplog: pytest.LogCaptureFixture) -> None:
    teacher = timm.create_model("test_resnet", num_classes=10)
    with caplog.at_level("INFO"):
        task = vx.wrap(vit(embed_dim=24), "fitnet", [teacher], hint=-1)
    assert "feature fitnet/hint of (1, 1) patches is resized to the student's (4, 4)" in caplog.text
    assert terms(task)["fitnet/hint"].isfinite()


def test_a_changed_student_is_no_timm_model(tmp_path: Path) -> None:
    task = vx.wrap(small("mixer"), "ccs", groups=4)
    with pytest.raises(ModelError, match="another model since circulant replaced parts of it"):
        vx.save(task, tmp_path / "student")
    assert not list(tmp_path.iterdir())
