"""The recipes that come with the package, and the schema of recipe files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import vmkd_fx as vx
from vmkd_fx.cli import main
from vmkd_fx.distill.data import open_data
from vmkd_fx.distill.listing import meanings
from vmkd_fx.distill.methods import PRESETS, resolve, resolve_all, settings_of
from vmkd_fx.distill.recipe import Recipe, TeacherConfig, load_recipe
from vmkd_fx.distill.recipe.schema import recipe_schema, schema_text
from vmkd_fx.distill.train import make_task
from vmkd_fx.errors import ModelError, RecipeError, VmkdError
from vmkd_fx.models import register

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "docs" / "recipe.schema.json"
FILES = sorted((ROOT / "recipes").glob("*.yaml"))
IMAGENET = [path for path in FILES if "digits" not in path.name]

by_name = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def presets(path: Path) -> list[str]:
    return [method.preset for method in load_recipe(path).method]


@by_name
def test_every_recipe_is_one(path: Path) -> None:
    recipe = load_recipe(path)
    assert Path(recipe.out) == Path("runs") / path.stem
    resolve_all([resolve(method.preset, method.overrides) for method in recipe.method] or "kd")


def test_there_is_one_for_every_preset() -> None:
    assert {preset for path in IMAGENET for preset in presets(path)} == set(PRESETS)
    assert ["vitkd", "nkd"] in [presets(path) for path in IMAGENET]


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_it_is_for_imagenet_folders_and_says_what_is_ours(path: Path) -> None:
    recipe = load_recipe(path, ["data=/data/imagenet"])
    assert (recipe.data.name, recipe.data.root) == ("folder", "/data/imagenet")
    assert recipe.data.augmentation == load_recipe(path).data.augmentation
    for processes in (1, 2, 4, 8):
        assert recipe.train.batch_size % (2 * processes) == 0
    assert all(teacher.checkpoint or teacher.options.get("pretrained") for teacher in recipe.teachers)
    head = path.read_text(encoding="utf-8").partition("student:")[0]
    assert re.search(r", (19|20)\d\d", head) and "recipe.schema.json" in head


def test_values_from_the_papers() -> None:
    """A sample, read in the papers: a recipe that drifts is noticed."""

    def train(name: str) -> Any:
        return load_recipe(ROOT / "recipes" / f"{name}.yaml").train

    assert train("riformer_s12").epochs == 600
    assert (train("ccs_mixer_b16").lr, train("ccs_mixer_b16").min_lr) == (1e-3, 1e-5)
    assert (train("cit_tiny").lr, train("cit_tiny").weight_decay) == (1e-3, 0.05)
    teachers = load_recipe(ROOT / "recipes" / "cit_tiny.yaml").teachers
    assert [teacher.model for teacher in teachers] == ["regnety_006.pycls_in1k", "rednet26"]
    assert train("vitkd_deit_tiny").batch_size == 1024 and train("vitkd_deit_tiny").optimizer == "adamw"
    (vitkd,) = load_recipe(ROOT / "recipes" / "vitkd_deit_tiny.yaml").method
    assert vitkd.overrides == {"alpha": 3e-5, "beta": 3e-6, "ratio": 0.5}


def without_weights(recipe: Recipe) -> tuple[Any, list[Any]]:
    """Student and teachers as graphs without numbers."""
    register()
    with torch.device("meta"):
        student = timm.create_model(recipe.student.model, **recipe.student.options)
        models = [
            timm.create_model(teacher.model.partition(".")[0], num_classes=1000)
            for teacher in recipe.teachers
        ]
    return student, models


@pytest.mark.parametrize(
    "path",
    [
        path if path.stem == "mgd_resnet18" else pytest.param(path, marks=pytest.mark.slow)
        for path in IMAGENET
    ],
    ids=lambda path: path.stem,
)
def test_the_method_fits_the_student_and_its_teachers(path: Path) -> None:
    recipe = load_recipe(path)
    student, teachers = without_weights(recipe)
    methods = [resolve(method.preset, method.overrides) for method in recipe.method]
    task = vx.wrap(student, methods, teachers, epochs=recipe.train.epochs)
    task.set_epoch(0)
    found = task(torch.zeros(2, 3, 224, 224, device="meta"), torch.zeros(2, dtype=torch.long, device="meta"))
    assert {f"{name}/" for name in presets(path)} >= {
        name.partition("/")[0] + "/" for name in found if "/" in name
    }
    assert found["loss"].shape == ()


def test_published_weights_of_other_classes_are_no_teacher() -> None:
    """timm would load all but the classifier, which would stay random."""
    recipe = load_recipe(ROOT / "recipes" / "kd_resnet18.yaml", ["data={name: digits, image_size: 32}"])
    with pytest.raises(
        ModelError, match=r"resnet34\.tv_in1k.* know 1000 classes .* digits has 10; .*`classes`"
    ):
        make_task(recipe, open_data(**recipe.data.model_dump()))


def test_a_folder_may_stand_for_the_data(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("student: {model: test_vit}\ndata: /data/birds\nout: o\n", encoding="utf-8")
    assert load_recipe(path).data.root == "/data/birds"
    assert load_recipe(path, ["data=/data/fish"]).data.root == "/data/fish"
    assert load_recipe(path, ["data={name: digits, labelled: 50}"]).data.labelled == 50
    path.write_text("student: {model: test_vit}\nout: o\n", encoding="utf-8")
    assert load_recipe(path, ["data=/data/fish"]).data.name == "folder"


def test_the_schedule_step_needs_its_epochs(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("student: {model: test_vit}\ntrain: {schedule: step}\nout: o\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: train: the schedule step needs decay_epochs"):
        load_recipe(path)
    assert load_recipe(path, ["train.decay_epochs=30"]).train.decay_rate == 0.1


def test_the_step_schedule_is_the_papers() -> None:
    from timm.optim import create_optimizer_v2

    from vmkd_fx.distill.training.optimisation import make_scheduler

    config = load_recipe(ROOT / "recipes" / "kd_resnet18.yaml").train
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), "sgd", lr=config.lr)
    scheduler = make_scheduler(optimizer, config, steps_per_epoch=10)
    rates = []
    for epoch in (0, 29, 30, 59, 60, 89, 90, 99):
        scheduler.step_update(epoch * 10 + 9 if epoch % 10 else epoch * 10)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.02, 2e-3, 2e-3, 2e-4, 2e-4])


def test_how_a_training_runs_is_no_part_of_its_digest() -> None:
    recipe = load_recipe(ROOT / "recipes" / "kd_resnet18.yaml")
    other = load_recipe(
        ROOT / "recipes" / "kd_resnet18.yaml",
        ["data.workers=1", "train.log_every=7", "out=elsewhere", "teachers.0.device=cuda:1"],
    )
    assert recipe.digest() == other.digest()
    assert recipe.digest() != load_recipe(ROOT / "recipes" / "kd_resnet18.yaml", ["train.lr=0.3"]).digest()


def test_the_schema_in_the_docs_is_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), (
        "vmkd recipes --schema > docs/recipe.schema.json"
    )
    assert main(["recipes", "--schema"]) == 0
    assert capsys.readouterr().out == schema_text()


def test_the_schema_has_every_key_with_its_meaning() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields) and schema["additionalProperties"] is False
    assert set(schema["$defs"]["TeacherConfig"]["properties"]) == set(TeacherConfig.model_fields)
    for name, method in PRESETS.items():
        found = schema["$defs"][f"method {name}"]
        assert set(found["properties"]) == {"preset", *settings_of(method)}
        assert all(known["description"] for known in found["properties"].values())
        assert set(meanings(type(method))) >= set(settings_of(method))
    for known in schema["$defs"].values():
        for key, value in known.get("properties", {}).items():
            assert value.get("description") or "$ref" in value or key == "preset", key


def allowed(value: Any, schema: Any, known: dict[str, Any]) -> bool:
    """Whether a value is what a schema describes: the part of JSON schema that ours uses."""
    if "$ref" in schema:
        return allowed(value, known[schema["$ref"].rpartition("/")[2].replace("%20", " ")], known)
    if "anyOf" in schema and not any(allowed(value, choice, known) for choice in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(allowed(value, choice, known) for choice in schema["oneOf"]) != 1:
        return False
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "boolean": bool,
        "null": type(None),
    }
    kind = schema.get("type")
    if kind == "number":
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
    elif kind and not (isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool))):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if isinstance(value, list):
        items = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        return len(items) == len(value) and all(map(lambda v, s: allowed(v, s, known), value, items))
    if isinstance(value, dict) and "properties" in schema:
        keys = schema["properties"]
        return {*schema.get("required", ())} <= {*value} <= {*keys} and all(
            allowed(item, keys[key], known) for key, item in value.items()
        )
    return True


def plain(path: Path) -> Any:
    """A recipe as an editor sees it: YAML 1.2, where 1.0e-3 is a number."""
    from vmkd_fx.distill.recipe_yaml import read

    return json.loads(json.dumps(read(path).data))


@by_name
def test_the_schema_takes_every_recipe(path: Path) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert allowed(plain(path), schema, schema["$defs"])


@pytest.mark.parametrize(
    "wrong",
    [
        "student: {modle: x}",
        "student: {model: x}\ntrain: {epochs: many}\nout: o",
        "student: {model: x}\ntrain: {schedule: cosin}\nout: o",
        "student: {model: x}\nmethod: {preset: std, alhpa: 0.5}\nout: o",
        "student: {model: x}\nmethod: {preset: sdt}\nout: o",
        "student: {model: x}",
    ],
)
def test_the_schema_refuses_what_loading_refuses(wrong: str, tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert not allowed(yaml.safe_load(wrong), schema, schema["$defs"])
    path = tmp_path / "wrong.yaml"
    path.write_text(wrong.replace("model: x", "model: test_vit"), encoding="utf-8")
    with pytest.raises(VmkdError):
        load_recipe(path)
