"""Images per second and core of the loader, beside torchvision's own loop over the same folders, in one run.

    python benchmarks/input_pipeline.py [--images 256] [--turns 40] [--augmentation deit] [--root FOLDER]

Both read the same JPEG files with the same transform of timm's, in this process, one batch each in turn, and
both give float32 batches. What ours does beyond: every image's random numbers come from its key, and files
that cannot be read are passed over. The rate is images per second of processor time, so that other work on
the machine does not count.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from vmkd_fx.distill.data import open_data
from vmkd_fx.graph.info import IMAGENET_MEAN, IMAGENET_STD
from vmkd_fx.progress import progress
from vmkd_fx.table import table
from vmkd_fx.timing import ratio_of

SIZE = 224
BATCH = 16
CLASSES = 4
# ImageNet's pictures are 469 x 387 on average.
PICTURE = (500, 375)
# DeiT's but for the magnitude, 9 there: timm's own transform then asks Pillow at times for what it refuses.
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "plain": {"interpolation": "bicubic", "color_jitter": None},
    "deit": {
        "interpolation": "bicubic",
        "auto_augment": "rand-m7-mstd0.5-inc1",
        "re_prob": 0.25,
        "re_mode": "pixel",
    },
}


def pictures(root: Path, count: int) -> None:
    """JPEG files of ImageNet's usual size in class folders; detail and noise give them its usual bytes."""
    random = np.random.RandomState(0)
    for part, number in (("train", count), ("val", CLASSES)):
        for index in range(number):
            folder = root / part / f"class_{index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(random.randint(0, 256, (24, 32, 3)).astype(np.uint8))
            pixels = np.asarray(coarse.resize(PICTURE, Image.Resampling.BICUBIC)).astype(np.int16)
            pixels += random.randint(-24, 25, pixels.shape).astype(np.int16)
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            picture.save(folder / f"{index}.jpg", quality=90)


def ours(root: Path, augmentation: dict[str, Any]) -> Iterator[object]:
    """Batches without end from this package."""
    data = open_data("folder", root=str(root), image_size=SIZE, augmentation=augmentation)
    for epoch in itertools.count():
        yield from data.train_batches(epoch, batch_size=BATCH)


def torchvisions(root: Path, augmentation: dict[str, Any]) -> Iterator[object]:
    """Batches without end from torchvision's folder and PyTorch's loader."""
    transform = create_transform(
        (3, SIZE, SIZE), is_training=True, mean=IMAGENET_MEAN, std=IMAGENET_STD, **augmentation
    )
    loader = DataLoader(ImageFolder(str(root / "train"), transform), BATCH, shuffle=True, drop_last=True)
    while True:
        yield from loader


def seconds_of(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Processor seconds of each call in each turn; who is first changes from turn to turn."""
    names, times = list(calls), {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in progress(range(turns), "batches"):
        for name in names if turn % 2 else reversed(names):
            started = time.process_time()
            calls[name]()
            times[name].append(time.process_time() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--augmentation", choices=sorted(AUGMENTATIONS), default="deit")
    parser.add_argument("--root", type=Path, help="folder with train/ and val/; generated pictures otherwise")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        root = given.root or Path(made)
        if given.root is None:
            pictures(root, given.images)
        augmentation = AUGMENTATIONS[given.augmentation]
        loops = {"vmkd-fx": ours(root, augmentation), "torchvision": torchvisions(root, augmentation)}
        times = seconds_of(
            {name: (lambda loop=loop: next(loop)) for name, loop in loops.items()}, given.turns
        )
    arrays = {name: np.array(seconds) for name, seconds in times.items()}
    rows = [(name, f"{BATCH / np.median(seconds):.1f}") for name, seconds in arrays.items()]
    print(table(("loader", "images/s and core"), rows, right=("images/s and core",)))
    # Rates are the inverse of seconds, so the ratio of the rates has the seconds the other way round.
    found = ratio_of(arrays["torchvision"], arrays["vmkd-fx"])
    interval = f"95 % interval {found.low:.3f} to {found.high:.3f}"
    print(f"vmkd-fx's rate is {found.value:.3f} of torchvision's, {interval}")


if __name__ == "__main__":
    main()
