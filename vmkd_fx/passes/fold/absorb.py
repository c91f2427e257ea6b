"""What can take a channel affine into its weights, and on which side.

    behind a Linear, a convolution or a norm:   s (W x + b) + t  = (s W) x + (s b + t)      W's rows are the
    channels before a Linear:                            W (s x + t) + b  = (W s) x + (b + W t)      W's
    columns are before a convolution:                       the same, summed over the kernel; with zero
                                                padding only for t = 0, since the padding is zero before the
                                                shift and t behind it

A transposed convolution has its kernel the other way round, and its borders are sums of fewer terms, so that
no shift moves into it from before.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from vmkd_fx.passes.fold.affine import long_axes
from vmkd_fx.passes.fold.holders import Holder, rewritten
from vmkd_fx.passes.fold.moves import Pair
from vmkd_fx.passes.rewrite import Rewrite


def scale_rows(
    weight: torch.Tensor | None, bias: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale * (W x + bias) + shift` as a new W and bias; a norm's weight is a W with one entry a row."""
    rows = torch.ones_like(scale) if weight is None else weight
    by_row = scale.reshape(scale.shape + (1,) * (rows.ndim - scale.ndim))
    return rows * by_row, shift if bias is None else bias * scale + shift


def scale_columns(
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor, groups: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """`W (scale * x + shift) + bias` as a new W and bias, for a Linear or a convolution kernel in groups."""
    rows, columns = weight.shape[:2]

    def for_each_row(vector: torch.Tensor) -> torch.Tensor:
        each = vector.reshape(groups, 1, columns).expand(groups, rows // groups, columns)
        return each.reshape(rows, columns, *(1 for _ in weight.shape[2:]))

    added = (weight * for_each_row(shift)).flatten(1).sum(1)
    return weight * for_each_row(scale), added if bias is None else bias + added


def swap_kernel(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """A transposed convolution's kernel (C, D / groups, ...) as a convolution's, (D, C / groups, ...), and
    back.
    """
    grouped = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return grouped.flatten(0, 1)


def refusal_behind(rewrite: Rewrite, holder: Holder, pair: Pair) -> str | None:
    """Why `holder` cannot take an affine of its result; None if it can."""
    if any(tensor.ndim and not long_axes(tensor) <= set(holder.out_axes) for tensor in pair):
        return f"the channels of {holder.node} are on another axis"
    if holder.kind == "rms_norm" and bool(pair[1].any()):
        return f"{holder.node} has no bias to take a shift"
    return None


def absorb_behind(rewrite: Rewrite, holder: Holder, pair: Pair) -> Node:
    """The operator anew, with the affine of its result in its weights."""
    shape = [rewrite.shape(holder.node)[axis] for axis in holder.out_axes]
    scale, shift = (_along(tensor, holder.out_axes, shape) for tensor in pair)
    weight, bias = rewrite.constant(holder.weight), rewrite.constant(holder.bias)
    if holder.kind == "conv_transpose":
        assert weight is not None
        weight = swap_kernel(weight, holder.groups)
    rows, added = scale_rows(weight, bias, scale, shift)
    if holder.kind == "conv_transpose":
        rows = swap_kernel(rows, holder.groups)
    keep_bias = holder.bias is not None or bool(added.any())
    return rewritten(rewrite, holder, holder.node.args[0], rows, added if keep_bias else None)


def refusal_before(rewrite: Rewrite, holder: Holder, pair: Pair) -> str | None:
    """Why `holder` cannot take an affine of its input; None if it can."""
    if holder.in_axis is None:
        return f"{holder.node} behind it has no matrix that could take it"
    if any(tensor.ndim and not long_axes(tensor) <= {holder.in_axis} for tensor in pair):
        return f"{holder.node} multiplies another axis"
    if holder.pads_with_zeros() and bool(pair[1].any()):
        return f"{holder.node} pads with zeros, which a shift would have to move"
    return None


def absorb_before(rewrite: Rewrite, holder: Holder, source: Node, pair: Pair) -> Node:
    """The operator anew on `source`, with the affine of its input in its weights."""
    assert holder.in_axis is not None
    channels = rewrite.shape(source)[holder.in_axis]
    scale, shift = (_along(tensor, (holder.in_axis,), [channels]) for tensor in pair)
    weight, bias = rewrite.constant(holder.weight), rewrite.constant(holder.bias)
    assert weight is not None
    if holder.kind == "conv_transpose":
        columns = weight * scale.reshape(-1, *(1 for _ in weight.shape[1:]))
        return rewritten(rewrite, holder, source, columns, bias)
    columns, added = scale_columns(weight, bias, scale, shift, holder.groups)
    keep_bias = holder.bias is not None or bool(added.any())
    return rewritten(rewrite, holder, source, columns, added if keep_bias else None)


def _along(tensor: torch.Tensor, axes: tuple[int, ...], shape: list[int]) -> torch.Tensor:
    """A broadcasting tensor as one over these axes alone."""
    if tensor.ndim == 0:
        return tensor.expand(shape)
    return tensor.reshape([tensor.shape[axis] for axis in axes]).expand(shape)
