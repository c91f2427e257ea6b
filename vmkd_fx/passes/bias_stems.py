"""The stems that make CiT's tokens (CiT 3.2).

A stem halves the image, stays at 64 channels for some layers, and projects cells of half the patch size:
(B, in_chans, H, W) to one token a patch, (B, P, C).
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import nn

from vmkd_fx.errors import MatchError
from vmkd_fx.models.rednet_blocks import involution_stem

WIDTH = 64
"""Channels of both stems in the authors' code; the paper does not print them."""


class TokenStem(nn.Module):
    """Layers that halve the image, and a convolution to tokens: (B, in_chans, H, W) to (B, P, C).

    Args:
        layers: to (B, WIDTH, H / 2, W / 2).
        channels: C.
        patch: edge of a patch in pixels, even.
    """

    def __init__(self, layers: nn.Sequential, channels: int, patch: int) -> None:
        super().__init__()
        self.layers = layers
        self.proj = nn.Conv2d(WIDTH, channels, patch // 2, patch // 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(self.layers(images)).flatten(2).transpose(1, 2)


class ConvStem(TokenStem):
    """A 7x7 convolution of stride 2 and two of 3x3, each with BatchNorm and ReLU, then the projection."""

    def __init__(self, in_chans: int, channels: int, patch: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(in_chans, WIDTH, 7, 2, 3, bias=False)]
        for _ in range(2):
            layers += [nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, bias=False)]
        super().__init__(nn.Sequential(*layers, nn.BatchNorm2d(WIDTH), nn.ReLU()), channels, patch)


class InvolutionStem(TokenStem):
    """RedNet's stem, 3x3 convolution of stride 2, 3x3 involution, 3x3 convolution, then the projection."""

    def __init__(self, in_chans: int, channels: int, patch: int) -> None:
        super().__init__(involution_stem(in_chans, WIDTH, nn.BatchNorm2d, nn.ReLU), channels, patch)


def patch_edge(image: tuple[int, int, int], patches: int, name: str) -> int:
    """The edge in pixels of `patches` square patches that fill an image (C, H, W).

    Raises:
        MatchError: there is no such even edge.
    """
    _, height, width = image
    edge = isqrt(height * width // patches)
    if edge * edge * patches != height * width or edge % 2 or height % edge or width % edge:
        raise MatchError(
            f"CiT's stems halve the image and then take whole patches, and {name} makes {patches} patches of "
            f"{height} x {width}: no square patches with an even edge; tokens='random' keeps its own patches"
        )
    return edge
