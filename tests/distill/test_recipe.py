from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from vmkd_fx.distill.recipe import Recipe, load_recipe
from vmkd_fx.distill.recipe_yaml import MAX_BYTES
from vmkd_fx.errors import RecipeError, UnknownNameError, VmkdError

GOOD = """\
student: {model: resmlp_12_224, options: {img_size: 32, drop_rate: 1e-1}}
teachers:
  - model: resnet10t
    checkpoint: teacher.safetensors
method: {preset: std}
data: {name: digits, labelled: 100}
train:
  epochs: 3
  lr: 2e-3
out: runs/std
"""

PLAIN = "student:\n  model: test_vit\ntrain:\n  epochs: 3\nout: o\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(VmkdError) as caught:
        load_recipe(write(folder, text), overrides)
    assert isinstance(caught.value, RecipeError | UnknownNameError)
    return str(caught.value)


def test_a_complete_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.student.options == {"img_size": 32, "drop_rate": 0.1}
    assert recipe.teachers[0].checkpoint == "teacher.safetensors"
    assert [(m.preset, m.overrides) for m in recipe.method] == [("std", {})]
    assert recipe.train.lr == 2e-3 and recipe.train.batch_size == 64
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    with pytest.raises(ValidationError):
        recipe.train.lr = 1.0


@pytest.mark.parametrize("method", ["", "method: none\n", "method: null\n"])
def test_no_method(tmp_path: Path, method: str) -> None:
    assert load_recipe(write(tmp_path, PLAIN + method)).method == ()


def test_method_forms_are_one() -> None:
    def method(value: object) -> object:
        return Recipe.model_validate({"student": {"model": "m"}, "out": "o", "method": value}).method

    assert method("std") == method({"preset": "std"})
    assert method("std+kd") == method(["std", {"preset": "kd"}])
    (changed,) = method({"preset": "std", "alpha": 0.5})  # type: ignore[misc]
    assert changed.overrides == {"alpha": 0.5}
    assert changed.model_dump() == {"preset": "std", "alpha": 0.5}


def test_unknown_method_or_option(tmp_path: Path) -> None:
    assert "recipe.yaml:6: method: there is no" in refusal(tmp_path, PLAIN + "method: sdt\n")
    text = refusal(tmp_path, PLAIN + "method: {preset: std, alhpa: 0.5}\n")
    assert "recipe.yaml:6: method: " in text and "alhpa" in text


def test_overrides(tmp_path: Path) -> None:
    two = PLAIN + "method: none\n"
    recipe = load_recipe(
        write(tmp_path, two), ["train.epochs=7", "data.labelled=50", "train.lr=1e-4", "out=a=b"]
    )
    assert (recipe.train.epochs, recipe.data.labelled, recipe.train.lr, recipe.out) == (7, 50, 1e-4, "a=b")
    text = refusal(tmp_path, two, "train.epoch=7")
    assert text.startswith("override train.epoch=7: train.epoch: ") and "'epochs'" in text
    assert "override train.epochs=x: train.epochs is 'x'" in refusal(tmp_path, two, "train.epochs=x")
    assert "key=value" in refusal(tmp_path, two, "train.epochs")
    assert "student.model is str" in refusal(tmp_path, two, "student.model.name=x")
    assert "teachers is a list of 1" in refusal(
        tmp_path, two + "teachers: [{model: test_vit}]\n", "teachers.1.model=x"
    )


def test_a_folder_on_the_command_line_is_data_like_any_other(tmp_path: Path) -> None:
    plain, given = write(tmp_path, PLAIN), ["data=/images", "data.image_size=64", "data.workers=2"]
    data = load_recipe(plain, given).data
    assert (data.name, data.root, data.image_size, data.workers) == ("folder", "/images", 64, 2)
    assert load_recipe(plain, ["data=/images", "data=/others"]).data.root == "/others"


def test_override_inside_a_list(tmp_path: Path) -> None:
    text = refusal(
        tmp_path, PLAIN + "method: x\nteachers:\n - {model: test_vit}\n", "teachers.0.model=test_vti"
    )
    assert text.startswith(
        "override teachers.0.model=test_vti: teachers.0.model: there is no model 'test_vti'"
    )


def test_unknown_key_says_where_and_what_is_near(tmp_path: Path) -> None:
    text = refusal(tmp_path, PLAIN.replace("epochs", "epoch"))
    assert "recipe.yaml:4: train.epoch: there is no key 'epoch'; did you mean 'epochs'" in text
    text = refusal(tmp_path, PLAIN + "techers: []\n")
    assert "recipe.yaml:6: techers: there is no key 'techers'; did you mean 'teachers'?" in text
    text = refusal(tmp_path, PLAIN + "method: std\nteachers:\n  - model: test_vit\n    option: {}\n")
    assert "recipe.yaml:9: teachers.0.option: " in text and "'options'" in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  epochs: many", "recipe.yaml:4: train.epochs is 'many': input should be a valid integer"),
        ("  epochs: 0", "recipe.yaml:4: train.epochs is 0: input should be greater than or equal to 1"),
        ("  epochs: true", "recipe.yaml:4: train.epochs is True"),
        ("  lr: .nan", "recipe.yaml:4: train.lr is nan"),
        ("  ema_decay: 1.0", "recipe.yaml:4: train.ema_decay is 1.0"),
        ("  warmup_epochs: 30", "recipe.yaml:3: train: warmup_epochs is 30; it must be below epochs, 30"),
    ],
)
def test_wrong_values_say_where(tmp_path: Path, line: str, expected: str) -> None:
    assert expected in refusal(tmp_path, PLAIN.replace("  epochs: 3", line))


def test_all_wrong_values_are_told_at_once(tmp_path: Path) -> None:
    text = refusal(tmp_path, "student: {}\ntrain: {epochs: x, lr: y}\n")
    assert [line.partition(": ")[2].split()[0] for line in text.splitlines()] == [
        "student.model",
        "train.epochs",
        "train.lr",
        "out",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "test_vit",
            "resnet5",
            "recipe.yaml:2: student.model: there is no model 'resnet5'; did you mean 'resnet50'",
        ),
        ("epochs: 3", "optimizer: admw", "recipe.yaml:4: train.optimizer: there is no optimizer 'admw'"),
        (
            "epochs: 3",
            "schedule: cosin",
            "train.schedule: there is no schedule 'cosin'; did you mean 'cosine'",
        ),
        ("out: o", "out: o\ndata: {name: digit}", "recipe.yaml:6: data.name: there is no data set 'digit'"),
    ],
)
def test_unknown_names_list_near_ones(tmp_path: Path, old: str, new: str, expected: str) -> None:
    text = refusal(tmp_path, PLAIN.replace(old, new))
    assert expected in text and "did you mean" in text


def test_teachers_without_a_method_are_refused(tmp_path: Path) -> None:
    assert "no method that uses them" in refusal(tmp_path, PLAIN + "teachers: [{model: test_vit}]\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a recipe is a mapping"),
        ("- a\n", "a recipe is a mapping"),
        ("student: [\n", "recipe.yaml:2: "),
        ("a: 1\nb: 2\na: 3\n", "recipe.yaml:3: a stands here again; it was set at"),
        ("a: &x [1]\nb: *x\n", "recipe.yaml:1: a recipe has no anchors"),
        ("a: &x [*x]\n", "recipe.yaml:1: a recipe has no anchors"),
        ("a: !!python/object/apply:os.system [ls]\n", "recipe.yaml:1: could not determine a constructor"),
        ("train: {on: 1}\n", "recipe.yaml:1: a key of train is no text"),
        ("a: " + "[" * 20_000, "nested too deeply"),
        ("a: 2020-13-45\n", "recipe.yaml: month must be"),
        ("#" * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(tmp_path, text)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read .*none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="the recipe's file stands before what changes it"):
        load_recipe("train.epochs=3", ["train.lr=0.1"])
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_digest_names_everything_but_the_folder(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN)
    digest = load_recipe(path).digest()
    assert digest == load_recipe(path, ["out=elsewhere"]).digest()
    assert digest == load_recipe(path, ["train.batch_size=64"]).digest()
    assert digest != load_recipe(path, ["train.seed=1"]).digest()


def test_every_setting_is_documented() -> None:
    undocumented = [
        f"{section}.{name}"
        for section in ("student", "data", "train")
        for name, field in Recipe.model_fields[section].annotation.model_fields.items()  # type: ignore[union-attr]
        if not field.description
    ]
    assert not undocumented


def test_the_example_in_the_documentation_is_a_recipe(tmp_path: Path) -> None:
    from vmkd_fx.distill import recipe as module

    example = (module.__doc__ or "").split("\n\n")[1]
    Recipe.model_validate(yaml.safe_load(example))
