"""The section `data` of a recipe, and a training from folders."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from vmkd_fx.distill.card import restore
from vmkd_fx.distill.data import Images, Mixing, open_data
from vmkd_fx.distill.recipe import DataConfig, Recipe, load_recipe
from vmkd_fx.distill.recipe.data import MixingConfig
from vmkd_fx.distill.train import train
from vmkd_fx.errors import RecipeError

RECIPE = """\
student: {model: mixer_nano_32}
data: {name: folder, root: ROOT, image_size: 32, crop_pct: 0.95, workers: 1, DATA}
train: {epochs: 1, batch_size: 12, label_smoothing: 0.1}
out: OUT
"""


def recipe(root: Path, out: Path, data: str = "mixing: {}, augmentation: {re_prob: 0.25}") -> Recipe:
    path = out.with_suffix(".yaml")
    path.write_text(RECIPE.replace("ROOT", str(root)).replace("OUT", str(out)).replace("DATA", data))
    return load_recipe(path)


def test_every_key_reaches_the_data(folders: Path) -> None:
    config = DataConfig(
        name="folder", root=str(folders), repeats=2, mixing=MixingConfig(), std=(0.2, 0.3, 0.4)
    )
    data = open_data(**config.model_dump())
    assert isinstance(data, Images)
    assert data.repeats == 2 and data.std == (0.2, 0.3, 0.4) and data.input_size == (3, 224, 224)
    assert data._train.mixing == Mixing()
    assert MixingConfig().model_dump() == asdict(Mixing())
    assert len(open_data(**DataConfig().model_dump(mode="json"))) == 200


def test_wrong_keys_are_refused_where_they_stand(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(RecipeError, match=r"yaml:2: data\.augmentation\.re_porb: .* did you mean 're_prob'"):
        recipe(folders, out, "augmentation: {re_porb: 0.1}")
    with pytest.raises(RecipeError, match="labelled has no meaning for the data set folder"):
        recipe(folders, out, "labelled: 100")
    with pytest.raises(ValueError, match="needs root"):
        DataConfig(name="folder")
    with pytest.raises(ValueError, match="mean, root has no meaning for the data set digits"):
        DataConfig(root="x", mean=(0.1, 0.2, 0.3))


def test_a_training_from_folders_and_what_its_card_says(folders: Path, tmp_path: Path) -> None:
    asked = recipe(folders, tmp_path / "run")
    result = train(asked, progress=False)
    assert result.steps == 3
    student, card = restore(result.weights)
    assert (card.crop_pct, card.interpolation, card.labels) == (
        0.95,
        "bicubic",
        ("class_0", "class_1", "class_2"),
    )
    assert student.info.crop_pct == 0.95 and student.info.input_size == (3, 32, 32)
    assert card.data is not None and card.data["root"] == str(folders)
