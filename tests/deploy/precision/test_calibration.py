"""Calibration images: the same few from the same folder, and an error for what is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmkd_fx.deploy.precision.calibration import calibration_images, pictures
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.errors import DataError
from vmkd_fx.frames import Frames

PREPROCESS = Preprocess((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop_pct=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten plain pictures, each of its own grey, in two folders, and a text beside them."""
    for index in range(10):
        place = tmp_path / ("cats" if index % 2 else "dogs")
        place.mkdir(exist_ok=True)
        Image.new("RGB", (12, 9), (20 * index,) * 3).save(place / f"{index}.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_a_folder_gives_the_same_pictures_in_their_order(folder: Path) -> None:
    assert [path.name for path in pictures(folder)] == [f"{i}.PNG" for i in (1, 3, 5, 7, 9, 0, 2, 4, 6, 8)]
    images = calibration_images(folder, PREPROCESS)
    assert images.shape == (10, 3, 8, 8) and images.dtype == np.float32
    np.testing.assert_array_equal(images[0], PREPROCESS(folder / "cats" / "1.PNG"))
    few = calibration_images(str(folder), PREPROCESS, most=4)
    np.testing.assert_array_equal(few, images[[0, 2, 5, 8]])


def test_arrays_and_pictures_and_frames(folder: Path) -> None:
    given = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    assert calibration_images(given, PREPROCESS).shape == (128, 3, 8, 8)
    np.testing.assert_array_equal(
        calibration_images(given[:5], PREPROCESS, Frames("nchw")), given[:5].transpose(0, 3, 1, 2)
    )
    opened = [Image.open(path) for path in pictures(folder)[:2]]
    np.testing.assert_array_equal(
        calibration_images(opened, PREPROCESS), calibration_images(folder, PREPROCESS)[:2]
    )


def test_what_is_no_image_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        calibration_images(tmp_path / "nowhere", PREPROCESS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no pictures \(\.bmp, "):
        calibration_images(tmp_path / "empty", PREPROCESS)
    (folder / "cats" / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.jpg holds no image"):
        calibration_images(folder, PREPROCESS)
    with pytest.raises(DataError, match="there are no calibration images"):
        calibration_images([], PREPROCESS)
    with pytest.raises(DataError, match="expected float32"):
        calibration_images(np.zeros((4, 3, 9, 9), np.float32), PREPROCESS)
    with pytest.raises(DataError, match="not finite"):
        calibration_images(np.full((4, 3, 8, 8), np.nan, np.float32), PREPROCESS)
