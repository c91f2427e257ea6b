"""Small pictures in class folders, made anew: nothing is downloaded, and nothing is kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vmkd_fx.distill.data import Batch, Images, open_data

AUGMENTATION = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "pixel", "hflip": 0.5}


def picture(number: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """A smooth picture, (width, height), another for every number."""
    random = np.random.RandomState(number)
    coarse = random.randint(0, 256, (4, 5, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def make_folders(root: Path, classes: int = 3, train: int = 12, val: int = 5) -> Path:
    """`root`/train/class_C/I.jpg and `root`/val/class_C/I.jpg; returns `root`."""
    number = 0
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / part / f"class_{label}"
            folder.mkdir(parents=True)
            for image in range(count):
                number += 1
                picture(number, (50 + image, 40)).save(folder / f"{image}.jpg", quality=90)
    return root


def opened(root: Path, **options: object) -> Images:
    """The folders as a data set of 32 x 32."""
    given = {"image_size": 32, "augmentation": AUGMENTATION, **options}
    data = open_data("folder", root=str(root), **given)  # type: ignore[arg-type]
    assert isinstance(data, Images)
    return data


def same(first: Iterable[Batch], second: Iterable[Batch]) -> bool:
    """Whether two courses of batches are equal, bit for bit."""
    pairs = zip(first, second, strict=True)
    return all(torch.equal(one, other) for pair in pairs for one, other in zip(*pair, strict=True))


def joined(shares: Iterable[Iterable[Batch]]) -> list[Batch]:
    """What all processes have of each batch, as one."""
    return [
        Batch(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))
        for pieces in zip(*shares, strict=True)
    ]
