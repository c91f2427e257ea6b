"""A student that begins with weights is told when it will see images normalised otherwise than they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from tests.distill.data.pictures import make_folders, opened
from vmkd_fx.distill.recipe import Recipe
from vmkd_fx.distill.train import make_task

MODEL = "test_vit2"  # timm gives it mean and std 0.5
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
ADVICE = "data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5]"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of pictures in three classes, and weights of the student."""
    folder = tmp_path_factory.mktemp("begun")
    save_file(timm.create_model(MODEL, num_classes=3).state_dict(), folder / "weights.safetensors")
    return make_folders(folder / "pictures", train=4, val=2), folder / "weights.safetensors"


@pytest.mark.parametrize(
    ("with_weights", "seen", "said"), [(True, {}, True), (True, HALF, False), (False, {}, False)]
)
def test_it_says_so(
    begun: tuple[Path, Path],
    with_weights: bool,
    seen: dict[str, tuple[float, ...]],
    said: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pictures, weights = begun
    student = {"model": MODEL, **({"checkpoint": str(weights)} if with_weights else {})}
    recipe = Recipe.model_validate({"student": student, "data": str(pictures), "out": "nowhere"})
    make_task(recipe, opened(pictures, image_size=160, **seen))
    assert (ADVICE in caplog.text) == said
