"""Mixup and cutmix of neighbours: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) as timm draws them.

The images at positions p and p + 1 of an epoch, p even, are a pair and mixed with each other:

    mixup   x_p <- l x_p + (1 - l) x_q            l ~ Beta(alpha, alpha)
    cutmix  a box of x_p is taken from x_q        the box covers 1 - l of the image, clipped at its borders
    both    y_p <- l y_p + (1 - l) y_q            for cutmix l is what the clipped box left of x_p

The distributions are those of `timm.data.Mixup` with mode="pair". What differs: timm pairs the first image of
a batch with its last and draws from a global generator; here the pair is that of two positions and l and the
box follow from (seed, epoch, pair), so they do not change with the batch size, the processes or the workers.
Targets are shares without label smoothing: smoothing them in the loss, (1 - s) y + s / classes, gives what
timm gives by smoothing before it mixes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from vmkd_fx.distill.data.keyed import words
from vmkd_fx.errors import DataError

_USE = 1

Box = tuple[slice, slice]


@dataclass(frozen=True)
class Mixing:
    """How pairs of training images are mixed.

    Attributes:
        mixup: alpha of mixup; 0: no mixup.
        cutmix: alpha of cutmix; 0: no cutmix.
        prob: share of the pairs that are mixed.
        switch_prob: share of these that are cut rather than mixed, where both are on.
        off_epoch: the first epoch without mixing; None: all are mixed.

    Raises:
        DataError: neither is on, or a value is out of its range.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    prob: float = 1.0
    switch_prob: float = 0.5
    off_epoch: int | None = None

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0 or not (self.mixup or self.cutmix):
            raise DataError(
                f"mixing needs mixup or cutmix above 0, found {self.mixup} and {self.cutmix}; "
                "leave mixing out to train on single images"
            )
        if not all(0 <= share <= 1 for share in (self.prob, self.switch_prob)):
            raise DataError(
                f"mixing: prob and switch_prob lie in 0..1, found {self.prob} and {self.switch_prob}"
            )

    def active(self, epoch: int) -> bool:
        """Whether the images of that epoch are mixed."""
        return self.off_epoch is None or epoch < self.off_epoch

    def draw(self, seed: int, epoch: int, pair: int, size: tuple[int, int]) -> tuple[float, Box | None]:
        """The share that an image of `size` (H, W) keeps of itself, and the box that is cut, if one is."""
        # Of NumPy's generators RandomState alone promises that its stream never changes.
        random = np.random.RandomState([*words(seed, epoch, pair, use=_USE)])
        mixed, switched = random.rand(2) < (self.prob, self.switch_prob)
        if not mixed:
            return 1.0, None
        if not self.cutmix or (self.mixup and not switched):
            return float(random.beta(self.mixup, self.mixup)), None
        return _box(float(random.beta(self.cutmix, self.cutmix)), size, random)

    def mix(
        self, images: Tensor, targets: Tensor, *, first: int, seed: int, epoch: int, classes: int
    ) -> tuple[Tensor, Tensor]:
        """Mix neighbours among `images` (B, C, H, W), which stand at positions `first` and on in their epoch.

        Returns:
            The images, changed in place, and the shares of the classes (B, classes) in float32.

        Raises:
            DataError: an image has no neighbour.
        """
        if len(images) % 2 or first % 2:
            raise DataError(
                f"mixing pairs neighbours and {len(images)} images at position {first} leave one alone: "
                "choose a batch_size that gives every process an even number"
            )
        size = (images.shape[-2], images.shape[-1])
        shares = F.one_hot(targets, classes).float()
        for place in range(0, len(images), 2):
            kept, box = self.draw(seed, epoch, (first + place) // 2, size)
            if kept == 1:
                continue
            pair, label = images[place : place + 2], shares[place : place + 2]
            if box is None:
                # Three roundings, each exact for its element: a fused product and sum would round by
                # where in memory an element lies.
                pair.copy_(pair * kept + pair.flip(0) * (1 - kept))
            else:
                pair[:, :, box[0], box[1]] = pair.flip(0)[:, :, box[0], box[1]]
            label.copy_(label * kept + label.flip(0) * (1 - kept))
        return images, shares


def _box(kept: float, size: tuple[int, int], random: np.random.RandomState) -> tuple[float, Box]:
    """A box of (1 - kept) of the area around a random centre, clipped, and the share that it leaves."""
    edges = []
    for side in size:
        cut = int(side * np.sqrt(1 - kept))
        centre = int(random.randint(side))
        edges.append(slice(max(0, centre - cut // 2), min(side, centre + (cut + 1) // 2)))
    rows, columns = edges
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return 1 - area / (size[0] * size[1]), (rows, columns)
