"""Cycle FC (Chen et al., "CycleMLP: A MLP-like Architecture for Dense Prediction", 2022).

A Cycle FC is a linear layer over the channels in which each channel is read from another place nearby:

    y[h, w, o] = b[o] + sum_c W[o, c] * x[h + dy_c, w + dx_c, c]        (zero outside the map)

Along its axis a kernel of K shifts channel c by (c + K // 2) mod K - K // 2: a staircase, 0, +1, -1, 0, ...
for K = 3. The cost is a linear layer's, and no layer knows the image's size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vmkd_fx.errors import ModelError

__all__ = ["CycleFC", "cycle_shift", "in_shift_order"]


@register_notrace_function
def cycle_shift(x: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Read every channel from its place, channels with one shift side by side.

    Args:
        x: (B, H, W, C); outside it is zero.
        kernel_size: (1, K) shifts along W, (K, 1) along H.

    Returns:
        (B, H, W, C): channels 0, K, 2K, ..., then 1, K + 1, ..., as `in_shift_order` has the weight's.
    """
    size = max(kernel_size)
    before, after = size // 2, size - 1 - size // 2
    along_width = kernel_size[1] == size
    padded = F.pad(x, (0, 0, before, after) if along_width else (0, 0, 0, 0, before, after))
    parts = []
    for first in range(min(size, x.shape[-1])):
        start = (first + before) % size
        places = slice(start, start - (size - 1) or None)
        window = padded[:, :, places] if along_width else padded[:, places]
        parts.append(window[..., first::size])
    return torch.cat(parts, dim=-1)


@register_notrace_function
def in_shift_order(weight: Tensor, size: int) -> Tensor:
    """A weight (O, C) with its columns as `cycle_shift` orders channels for a kernel of this size."""
    return torch.cat([weight[:, first::size] for first in range(min(size, weight.shape[1]))], dim=1)


class CycleFC(nn.Module):
    """(B, H, W, in_features) -> (B, H, W, out_features): a linear layer on shifted channels.

    The weight is (out_features, in_features), in the channels' own order.

    Args:
        in_features, out_features: channels.
        kernel_size: (1, K) shifts along the width, (K, 1) along the height.
        bias: whether to add one.

    Raises:
        ModelError: the kernel extends along two axes, or is not (height, width).
    """

    def __init__(
        self, in_features: int, out_features: int, kernel_size: tuple[int, int], bias: bool = True
    ) -> None:
        super().__init__()
        if len(kernel_size) != 2 or min(kernel_size) != 1:
            raise ModelError(
                f"a Cycle FC with kernel_size={tuple(kernel_size)}: it shifts along one axis; give (1, K) "
                "for the width or (K, 1) for the height"
            )
        self.in_features, self.out_features = in_features, out_features
        self.kernel_size = (int(kernel_size[0]), int(kernel_size[1]))
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in CycleMLP: truncated normal of 0.02, no bias."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = in_shift_order(self.weight, max(self.kernel_size))
        return F.linear(cycle_shift(x, self.kernel_size), weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kernel_size={self.kernel_size}"
