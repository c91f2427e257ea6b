"""The same tensor as timm's own, bit for bit: over the settings that its models were published with, and over
the kinds of pictures that its loader meets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_data_config

from vmkd_fx.deploy.preprocess import INTERPOLATIONS, Preprocess

SHAPES = ((37, 53), (301, 200), (500, 333), (640, 480))


@functools.cache
def published() -> tuple[Preprocess, ...]:
    """Every way in which a published model wants its images, the smallest first."""
    found = set()
    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name).to_dict()
        for test_size in (False, True):
            found.add(Preprocess(**resolve_data_config(pretrained_cfg=config, use_test_size=test_size)))
    return tuple(sorted(found, key=lambda p: (p.input_size, str(p))))


@functools.cache
def distinct() -> tuple[Preprocess, ...]:
    """One of each interpolation, mode and part of the image, at the smallest size."""
    found: dict[object, Preprocess] = {}
    for p in published():
        height, width = p.input_size[1:]
        found.setdefault((p.interpolation, p.crop_mode, p.crop_pct, height == width), p)
    return tuple(found.values())


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def timms(p: Preprocess) -> Callable[[Image.Image], object]:
    return create_transform(
        p.input_size,
        is_training=False,
        mean=p.mean,
        std=p.std,
        interpolation=p.interpolation,
        crop_pct=p.crop_pct,
        crop_mode=p.crop_mode,
    )


def assert_same(p: Preprocess, image: Image.Image) -> None:
    np.testing.assert_array_equal(p(image), timms(p)(image), err_msg=f"{p} on {image.size}", strict=True)


def test_what_is_published_is_known() -> None:
    """All of it can be said in a manifest; the kinds that the tests below lean on are among it."""
    assert len(published()) > 150
    assert {p.crop_mode for p in published()} == {"center", "squash", "border"}
    assert {p.interpolation for p in published()} <= set(INTERPOLATIONS)
    assert {p.input_size[1] == p.input_size[2] for p in published()} == {True, False}
    assert max(p.crop_pct for p in published()) > 1


@pytest.mark.parametrize("index", range(0, 60, 3))
def test_every_kind_that_is_published(index: int) -> None:
    for offset, p in enumerate(distinct()[index : index + 3]):
        assert_same(p, picture(*SHAPES[(index + offset) % len(SHAPES)]))


@pytest.mark.slow
@pytest.mark.parametrize("size", SHAPES)
def test_everything_that_is_published(size: tuple[int, int]) -> None:
    for p in published():
        assert_same(p, picture(*size))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(37, 53), (33, 32), (301, 20)])
def test_every_interpolation_that_timm_has(interpolation: str, size: tuple[int, int]) -> None:
    for mode in ("center", "squash", "border"):
        assert_same(Preprocess((3, 32, 40), (0.5,) * 3, (0.3,) * 3, interpolation, 0.9, mode), picture(*size))


def in_sixteen_bits() -> Image.Image:
    return Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(48, 40) * 33)


def turned() -> Image.Image:
    """What a phone writes that was held upright: the picture lies, and EXIF says so."""
    image = picture(48, 40)
    image.getexif()[0x0112] = 6
    return image


def with_transparent_colour() -> Image.Image:
    image = picture(48, 40).quantize(16)
    image.info["transparency"] = 3
    return image


PICTURES: dict[str, tuple[Callable[[], Image.Image], str]] = {
    "grey": (lambda: picture(48, 40).convert("L"), "PNG"),
    "grey and alpha": (lambda: picture(48, 40).convert("LA"), "PNG"),
    "rgba": (lambda: picture(48, 40).convert("RGBA"), "PNG"),
    "cmyk": (lambda: picture(48, 40).convert("CMYK"), "JPEG"),
    "palette": (lambda: picture(48, 40).quantize(16), "PNG"),
    "palette, transparent": (with_transparent_colour, "PNG"),
    "one bit": (lambda: picture(48, 40).convert("1"), "PNG"),
    "sixteen bits": (in_sixteen_bits, "PNG"),
    "thirty-two bits": (lambda: picture(48, 40).convert("I"), "TIFF"),
    "floating point": (lambda: picture(48, 40).convert("F"), "TIFF"),
    "luminance and colour": (lambda: picture(48, 40).convert("YCbCr"), "JPEG"),
    "turned": (turned, "JPEG"),
    "animated": (lambda: picture(48, 40).quantize(16), "GIF"),
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("channels", [3, 1])
def test_pictures_are_read_as_timm_s_loader_reads_them(kind: str, channels: int, tmp_path: Path) -> None:
    """That is by `convert`; a turn that EXIF asks for is not made, as training did not make it either."""
    make, written = PICTURES[kind]
    (tmp_path / "class").mkdir()
    path = tmp_path / "class" / "picture.png"  # whatever it is: both look at the contents
    image = make()
    image.save(path, written, exif=image.getexif())
    p = Preprocess((channels, 32, 32), (0.5,) * channels, (0.25,) * channels, "bicubic", 0.9)
    data = ImageDataset(tmp_path, transform=timms(p), input_img_mode="RGB" if channels == 3 else "L")
    expected, _ = data[0]
    np.testing.assert_array_equal(p(path), expected.numpy(), strict=True)
    if kind == "turned":
        assert Image.open(path).getexif()[0x0112] == 6
