"""Features in the layout that a loss or a head wants: tokens (B, N, C) or a map (B, C, H, W)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from vmkd_fx.errors import ModelError, UnknownNameError
from vmkd_fx.passes.heads.full_precision import widened

LAYOUTS = ("NLC", "NCHW", "NHWC")
MODES = ("bicubic", "bilinear")


def to_tokens(x: torch.Tensor, layout: str, prefix_tokens: int = 0) -> torch.Tensor:
    """A feature in its own layout as patch tokens (B, N, C), row by row, without its prefix tokens."""
    if layout not in LAYOUTS:
        raise UnknownNameError("layout", layout, LAYOUTS)
    if layout == "NCHW":
        return x.flatten(2).transpose(1, 2)
    if layout == "NHWC":
        return x.flatten(1, 2)
    return x[:, prefix_tokens:] if prefix_tokens else x


def to_map(
    x: torch.Tensor, layout: str, grid: tuple[int, int] | None = None, prefix_tokens: int = 0
) -> torch.Tensor:
    """A feature in its own layout as a map (B, C, H, W).

    Args:
        grid: (H, W) of the patches, for tokens alone; without it they are taken as a square.

    Raises:
        ModelError: that many tokens do not fill the grid.
    """
    if layout == "NCHW":
        return x
    if layout == "NHWC":
        return x.permute(0, 3, 1, 2)
    tokens = to_tokens(x, layout, prefix_tokens)
    height, width = grid or square(tokens.shape[1])
    if height * width != tokens.shape[1]:
        raise ModelError(
            f"{tokens.shape[1]} tokens do not fill a grid of {height} x {width} patches; "
            "say the grid of the patches and how many prefix tokens stand in front"
        )
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def resize_tokens(
    x: torch.Tensor, grid: tuple[int, int], to_grid: tuple[int, int], mode: str = "bicubic"
) -> torch.Tensor:
    """Patch tokens of one grid as those of another: (B, N, C) to (B, N', C), without prefix tokens.

    A teacher with other patches or another image size is brought to the student's grid in this way; smaller
    grids are antialiased. Equal grids give the tokens themselves; half precision is resized in float32, which
    PyTorch cannot do otherwise on every device, and stays float32.

    Raises:
        ModelError: there are not as many tokens as `grid` says.
    """
    if mode not in MODES:
        raise UnknownNameError("interpolation", mode, MODES)
    height, width = grid
    if x.shape[1] != height * width:
        raise ModelError(
            f"a grid of {height} x {width} patches has {height * width} tokens, the feature has "
            f"{x.shape[1]}; leave its prefix tokens out with to_tokens(x, 'NLC', prefix_tokens)"
        )
    if grid == to_grid:
        return x
    image = widened(x).transpose(1, 2).unflatten(2, grid)
    resized = F.interpolate(image, size=to_grid, mode=mode, antialias=True, align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def square(tokens: int) -> tuple[int, int]:
    """The sides of a square of so many patches."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ModelError(f"{tokens} tokens are no square; give the grid of the patches, (height, width)")
    return side, side
