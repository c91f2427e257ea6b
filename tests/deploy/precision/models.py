"""Small lowered graphs, one made to overflow in half, and nets that learned the digits."""

from __future__ import annotations

import functools

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

import vmkd_fx as vx
from tests.models import FoldableNet, small
from vmkd_fx.distill.data import open_data
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import randomise_
from vmkd_fx.models import register

LARGEST = 65504.0
TARGET = "tensorrt-rtx"


class Residual(nn.Module):
    """A net of the ResNet kind: convolutions, ReLU, skip connections that do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 10
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for first, second in (self.convs[:2], self.convs[2:]):
            x = torch.relu(x + second(torch.relu(first(x))))
        return self.head(x.mean((2, 3)))


def tiny_vit() -> VisionTransformer:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10}
    model = VisionTransformer(**size, class_token=False, global_pool="avg")
    nn.init.normal_(model.head.weight, std=0.5)
    return model.eval()


def overflowing_vit(reach: float = 2e5) -> VisionTransformer:
    """One channel of the residual stream is far beyond half's range between the first and the last block."""
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[0] += reach
        model.blocks[-1].mlp.fc2.bias[0] -= reach
    return model


@functools.cache
def lowered(name: str) -> TracedModule:
    """A lowered graph of random parameters; shared, so nobody may change it."""
    torch.manual_seed(0)
    if name == "overflowing":
        return vx.lower(overflowing_vit(), TARGET)
    if name == "vit":
        return vx.lower(randomise_(tiny_vit()), TARGET)
    if name == "residual":
        return vx.lower(vx.trace(Residual(), input_size=(3, 32, 32)), TARGET)
    if name == "foldable":
        return vx.lower(vx.trace(FoldableNet(), input_size=(3, 32, 32)), TARGET)
    return vx.lower(randomise_(small(name)), TARGET)


def images(count: int = 16, size: int = 32, seed: int = 0) -> NDArray[np.float32]:
    """Noise on a colour of its own for each image, so that a random model tells them apart."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal((count, 3, size, size), dtype=np.float32)
    return noise + 4 * random.standard_normal((count, 3, 1, 1), dtype=np.float32)


@functools.cache
def trained(name: str, epochs: int) -> TracedModule:
    """A net of the demo after `epochs` epochs on a thousand digits, lowered."""
    register()
    torch.manual_seed(0)
    options = {"img_size": 16} if name == "mixer_nano_32" else {}
    model = timm.create_model(name, num_classes=10, **options)
    data = open_data("digits", labelled=1000, image_size=16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for batch, targets, _ in data.train_batches(epoch, batch_size=50):
            optimiser.zero_grad()
            F.cross_entropy(model(batch), targets).backward()
            optimiser.step()
    return vx.lower(vx.trace(model.eval(), input_size=(3, 16, 16)), "onnxruntime")


@functools.cache
def digits() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Images to calibrate with, images to judge on, and what these show."""
    data = open_data("digits", labelled=1000, image_size=16)
    calibration = next(iter(data.train_batches(0, batch_size=128)))[0].numpy()
    batches = list(data.validation_batches())
    return (
        calibration,
        torch.cat([batch.images for batch in batches]).numpy(),
        torch.cat([batch.targets for batch in batches]).numpy(),
    )
