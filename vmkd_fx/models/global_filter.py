"""GFNet's global filter (Rao et al., 2021): a circular convolution over all tokens, by frequencies.

    X = rfft2(x)      Z = K * X      y = irfft2(Z)      both transforms orthonormal, over height and width

for each channel; K is a complex weight for each frequency and channel, learnt directly.

The columns of Z at width frequency 0, and at W/2 for an even W, need not be Hermitian, and what a real
inverse transform in two dimensions makes of such a Z is left open by its definition. Here it is a complex
inverse over the height, then a real inverse over the width, which drops the imaginary part of those columns.
"""

from __future__ import annotations

import torch
import torch.fx
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

__all__ = ["Downsample", "GlobalFilter", "GlobalFilterBlock", "global_filter"]

Grid = tuple[int, int]


def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """Filter maps, one node in a graph.

    Half precision is transformed in float32, the least that every device can; float64 stays float64.

    Args:
        x: maps (B, H, W, C).
        weight: (H, W // 2 + 1, C, 2), real and imaginary parts.

    Returns:
        Maps (B, H, W, C) of the same dtype as `x`.
    """
    width = x.shape[2]
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    frequencies = torch.fft.rfft2(x.to(dtype), dim=(1, 2), norm="ortho")
    frequencies = frequencies * torch.view_as_complex(weight.to(dtype))
    columns = torch.fft.ifft(frequencies, dim=1, norm="ortho")
    return torch.fft.irfft(columns, n=width, dim=2, norm="ortho").to(x.dtype)


# One node, because the choice of dtype must not be made while tracing: a graph may be cast afterwards.
torch.fx.wrap("global_filter")


class GlobalFilter(nn.Module):
    """The filter on tokens (B, H * W, C), row by row.

    Args:
        dim: channels C.
        grid_size: (H, W) in tokens; the filter has a weight for each frequency of this grid, and fits no
            other.
    """

    def __init__(self, dim: int, grid_size: Grid) -> None:
        super().__init__()
        self.grid_size = grid_size
        height, width = grid_size
        self.complex_weight = nn.Parameter(torch.randn(height, width // 2 + 1, dim, 2) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        maps = x.unflatten(1, self.grid_size)
        return global_filter(maps, self.complex_weight).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}"


class GlobalFilterBlock(nn.Module):
    """x + gamma * MLP(LN(filter(LN(x)))) on tokens (B, H * W, C): one residual spans the filter and the MLP.

    Args:
        dim: channels C.
        grid_size: (H, W).
        mlp_ratio: hidden width over C.
        layer_scale: where gamma starts; None for no gamma.
        drop: rate behind both layers of the MLP.
        drop_path: rate of dropping the whole branch.
    """

    def __init__(
        self,
        dim: int,
        grid_size: Grid,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.filter = GlobalFilter(dim, grid_size)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.mlp(self.norm2(self.filter(self.norm1(x))))
        if self.gamma is not None:
            branch = self.gamma * branch
        return x + self.drop_path(branch)


class Downsample(nn.Module):
    """Tokens (B, H * W, C) to (B, H/2 * W/2, D) by a 2x2 convolution of stride 2; an odd last row or column
    is left out.
    """

    def __init__(self, dim: int, out_dim: int, grid_size: Grid) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.proj = nn.Conv2d(dim, out_dim, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        maps = x.transpose(1, 2).unflatten(2, self.grid_size)
        return self.proj(maps).flatten(2).transpose(1, 2)
