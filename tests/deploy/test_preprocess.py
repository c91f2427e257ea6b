from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform

from vmkd_fx.deploy.decode import decode
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(37, 53), (301, 200), (20, 20), (500, 333), (33, 32)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("input_size", [(3, 32, 32), (3, 64, 47)])
def test_bitwise_equal_to_timm(
    size: tuple[int, int],
    interpolation: str,
    crop_pct: float,
    crop_mode: str,
    input_size: tuple[int, int, int],
) -> None:
    image = random_image(*size)
    settings = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    expected = create_transform(input_size, is_training=False, mean=MEAN, std=STD, **settings)(image).numpy()
    found = Preprocess(input_size, MEAN, STD, interpolation, crop_pct, crop_mode)(image)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_greyscale_is_bitwise_equal_to_timm() -> None:
    image = random_image(50, 41)
    expected = create_transform((1, 28, 28), is_training=False, mean=(0.5,), std=(0.25,))(image.convert("L"))
    found = Preprocess((1, 28, 28), (0.5,), (0.25,), "bilinear")(image)
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_a_file_of_another_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    image = random_image(32, 32).convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    preprocess = Preprocess((3, 32, 32), MEAN, STD, crop_pct=1.0)
    np.testing.assert_array_equal(preprocess(path), preprocess(image.convert("RGB")))


def test_arrays_of_the_input_size_equal_images(pixels: NDArray[np.uint8]) -> None:
    preprocess = Preprocess((3, 32, 32), MEAN, STD, crop_pct=1.0)
    one_by_one = np.stack([preprocess(Image.fromarray(image)) for image in pixels])
    np.testing.assert_array_equal(preprocess.normalise(pixels), one_by_one)


def test_arrays_of_another_size_or_type_are_refused(pixels: NDArray[np.uint8]) -> None:
    preprocess = Preprocess((3, 32, 32), MEAN, STD)
    for wrong in (pixels[:, :31], pixels[0], pixels.astype(np.int64)):
        with pytest.raises(DataError, match=r"expected uint8 \(B, 32, 32, 3\)"):
            preprocess.normalise(wrong)


def plain(preprocess: Preprocess) -> dict[str, object]:
    return json.loads(json.dumps(asdict(preprocess)))


def test_json_round_trips() -> None:
    preprocess = Preprocess((3, 64, 48), MEAN, STD, "bilinear", 0.9, "squash")
    assert decode(Preprocess, plain(preprocess), "it") == preprocess


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("input_size", [3, 0, 32], "whole numbers"),
        ("input_size", [3, 8193, 32], "whole numbers"),
        ("input_size", [4, 32, 32], "1 .* or 3"),
        ("mean", [0.5, float("nan"), 0.5], "finite"),
        ("mean", [0.5], "one a channel"),
        ("std", [0.5, float("inf"), 0.5], "finite"),
        ("std", [0.5, 0.0, 0.5], "positive"),
        ("std", "abc", "it.std must be a list"),
        ("crop_pct", 0, "crop_pct"),
        ("crop_pct", "1", "crop_pct"),
        ("crop_pct", float("nan"), "crop_pct"),
        ("interpolation", "random", "bicubic"),
        ("crop_mode", "zoom", "center"),
        ("extra", 1, "'extra' is unknown"),
    ],
)
def test_values_that_are_not_allowed(key: str, value: object, reason: str) -> None:
    data = {**plain(Preprocess((3, 32, 32), MEAN, STD)), key: value}
    with pytest.raises(DataError, match=reason):
        decode(Preprocess, data, "it")


def test_paths_without_an_image(tmp_path: Path) -> None:
    preprocess = Preprocess((3, 32, 32), MEAN, STD)
    with pytest.raises(DataError, match="there is no image"):
        preprocess(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png holds no image"):
        preprocess(tmp_path / "text.png")
