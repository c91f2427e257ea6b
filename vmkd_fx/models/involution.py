"""Involution (Li et al., "Involution: Inverting the Inherence of Convolution", 2021): each place its kernel.

    y[b, c, i, j] = sum_uv k[b, c // 16, u, v, i, j] * x[b, c, s i + u - K // 2, s j + v - K // 2]

A convolution has one kernel for all places and another for each channel; an involution has one kernel for 16
channels and another for each place. The kernels are made from what stands there: pooled by the stride,
reduced, normalised and spanned to K * K numbers a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vmkd_fx.errors import ModelError

__all__ = ["Involution2d", "involve", "involve_unfolded"]


@register_notrace_function
def involve(x: Tensor, kernels: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Multiply each neighbourhood by the kernel of its place and add up (Li et al., Eq. 4).

    No unfolded copy of K * K times the input is made: see `_by_place` and, for files that are exported,
    `_by_column`. One node in a traced graph.

    Args:
        x: (B, C, H, W); outside it is zero.
        kernels: (B, G * K * K, H', W'), G dividing C; the channel group * K * K + u * K + v holds the weight
            of row u, column v of the neighbourhood centred on (s i, s j).
        kernel_size: K, odd.
        stride: s; H' = ceil(H / s), W' = ceil(W / s).

    Returns:
        (B, C, H', W').
    """
    edge, groups = kernel_size // 2, kernels.shape[1] // kernel_size**2
    padded = F.pad(x, (edge, edge, edge, edge)).unflatten(1, (groups, -1))  # (B, G, C / G, H + 2e, W + 2e)
    weights = kernels.unflatten(1, (groups, 1, kernel_size, kernel_size))  # (B, G, 1, K, K, H', W')
    add_up = _by_column if torch.compiler.is_exporting() else _by_place
    return add_up(padded, weights, stride).flatten(1, 2)


def _by_place(padded: Tensor, weights: Tensor, stride: int) -> Tensor:
    """The K * K places one after the other: views alone, and one sum that grows; least memory and time."""
    rows, columns = (stride * (length - 1) + 1 for length in weights.shape[-2:])
    total: Tensor | None = None
    for u, of_row in enumerate(weights.unbind(3)):
        row = padded[:, :, :, u : u + rows : stride]
        for v, weight in enumerate(of_row.unbind(3)):
            part = row[..., v : v + columns : stride]
            total = weight * part if total is None else torch.addcmul(total, weight, part)
    assert total is not None
    return total


def _by_column(padded: Tensor, weights: Tensor, stride: int) -> Tensor:
    """The K columns one after the other, all rows at once: K copies of the input, and a quarter of the nodes,
    each of which an exporter, a file and an engine's builder pays for.
    """
    rows, columns = (stride * (length - 1) + 1 for length in weights.shape[-2:])
    shifted = [padded[:, :, :, u : u + rows : stride] for u in range(weights.shape[3])]
    strips = torch.stack(shifted, dim=3)  # (B, G, C / G, K, H', W + 2e)
    total: Tensor | None = None
    for v, weight in enumerate(weights.unbind(4)):
        part = (strips[..., v : v + columns : stride] * weight).sum(3)
        total = part if total is None else total + part
    assert total is not None
    return total


def involve_unfolded(x: Tensor, kernels: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """`involve` on an unfolded copy: fewest operators, K * K times the input in memory; for lowering."""
    edge, groups = kernel_size // 2, kernels.shape[1] // kernel_size**2
    places = kernels.shape[-2:]
    cells = F.unfold(x, kernel_size, padding=edge, stride=stride)  # (B, C * K * K, H' * W')
    cells = cells.unflatten(2, places).unflatten(1, (groups, -1, kernel_size**2))
    return (cells * kernels.unflatten(1, (groups, 1, -1))).sum(3).flatten(1, 2)


class Involution2d(nn.Module):
    """An involution that makes its own kernels (Li et al., Eq. 6): span(ReLU(BN(reduce(pool(x))))).

    With a stride the kernels come from the mean of each stride x stride cell, while the neighbourhood is
    centred on the cell's first place, as the authors have it. Where the stride does not divide H or W, the
    last cells are smaller and their mean is over what is there; the authors' code fails on such images.

    Args:
        channels: C, a multiple of `group_channels`.
        kernel_size: K, odd.
        stride: (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)).
        group_channels: channels that share a kernel.
        reduction: the kernels are made from C / reduction channels.
        norm_layer, act_layer: between reduce and span.

    Raises:
        ModelError: no such involution exists.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        group_channels: int = 16,
        reduction: int = 4,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        act_layer: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        _check(channels, kernel_size, stride, group_channels, reduction)
        self.channels, self.kernel_size, self.stride = channels, kernel_size, stride
        self.group_channels = group_channels
        hidden, groups = channels // reduction, channels // group_channels
        # Without padding both ways of counting are one; runtimes get the one of padding and ceil_mode wrong.
        cells = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        self.pool = cells if stride > 1 else nn.Identity()
        self.reduce = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = norm_layer(hidden)
        self.act = act_layer()
        self.span = nn.Conv2d(hidden, groups * kernel_size**2, 1)

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels of all places: (B, C, H, W) -> (B, G * K * K, H', W'); see `involve`."""
        return self.span(self.act(self.norm(self.reduce(self.pool(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return involve(x, self.kernels(x), self.kernel_size, self.stride)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"group_channels={self.group_channels}"
        )


def _check(channels: int, kernel_size: int, stride: int, group_channels: int, reduction: int) -> None:
    if min(channels, kernel_size, stride, group_channels, reduction) < 1:
        raise ModelError(
            f"an involution of {channels} channels with kernel_size={kernel_size}, stride={stride}, "
            f"group_channels={group_channels}, reduction={reduction}: each must be at least 1"
        )
    if channels % group_channels:
        near = group_channels * max(1, round(channels / group_channels))
        raise ModelError(
            f"an involution of {channels} channels in groups of {group_channels}: the groups must fill the "
            f"channels; take {near} channels or a group_channels that divides {channels}"
        )
    if kernel_size % 2 == 0:
        raise ModelError(
            f"an involution with kernel_size={kernel_size} has no centre; take {kernel_size - 1} or "
            f"{kernel_size + 1}"
        )
    if channels < reduction:
        raise ModelError(
            f"an involution of {channels} channels with reduction={reduction} makes its kernels from no "
            f"channel; take a reduction of {channels} or less"
        )
