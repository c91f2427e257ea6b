"""Where a channel affine may stand: it moves through whatever treats its channels alike.

    permute(s x + t) = s' permute(x) + t'            mean(s x + t) = s mean(x) + t, s and t alike where it
    averages

A permutation or a reshape takes scale and shift along as tensors of their own; averages, upsampling and rolls
let pass what is alike along the axes that they work on; zero padding lets a scale pass, and no shift.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.fold.affine import long_axes
from vmkd_fx.passes.rewrite import Rewrite, argument, is_call

aten = torch.ops.aten

Pair = tuple[torch.Tensor, torch.Tensor]
"""Scale and shift, each with as many axes as the value that they belong to, or none."""

RESHAPES = (
    *(aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
    aten._unsafe_view,
)
PERMUTES = (aten.permute, aten.transpose)
_AVERAGES = (aten.adaptive_avg_pool2d, aten.adaptive_avg_pool1d, aten.avg_pool2d, aten.avg_pool1d)
_RESIZES = (aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d)
_ROLLS = (aten.roll, aten.flip)


def moves(node: Any) -> bool:
    """Whether some affines pass through `node`."""
    return is_call(node, *RESHAPES, *PERMUTES, *_AVERAGES, *_RESIZES, *_ROLLS, aten.mean, aten.pad)


def backward(rewrite: Rewrite, node: Node, pair: Pair) -> Pair | None:
    """The affine before `node` that does what `pair` does behind it; None if there is none."""
    return _moved(rewrite, node, pair, node, node.args[0])


def forward(rewrite: Rewrite, node: Node, pair: Pair) -> Pair | None:
    """The affine behind `node` that does what `pair` does before it; None if there is none."""
    return _moved(rewrite, node, pair, node.args[0], node)


def _moved(rewrite: Rewrite, node: Node, pair: Pair, here: Any, there: Any) -> Pair | None:
    if all(tensor.ndim == 0 for tensor in pair):
        return pair if _keeps_a_number(rewrite, node, pair) else None
    if is_call(node, *PERMUTES):
        order = permutation(node, len(rewrite.shape(node)))
        order = order if here is not node else [order.index(axis) for axis in range(len(order))]
        return _each(pair, lambda tensor: tensor.permute(order))
    if is_call(node, *RESHAPES):
        return _reshaped(rewrite, pair, here, there)
    worked_on = _axes(rewrite, node)
    if worked_on is None or any(long_axes(tensor) & worked_on for tensor in pair if tensor.ndim):
        return None
    if not _keeps_a_number(rewrite, node, pair):
        return None
    if len(rewrite.shape(here)) == len(rewrite.shape(there)):
        return pair
    dropped = sorted(worked_on)
    if here is node:
        return _each(pair, lambda tensor: _with_axes(tensor, dropped))
    return _each(pair, lambda tensor: tensor.squeeze(dropped))


def _keeps_a_number(rewrite: Rewrite, node: Node, pair: Pair) -> bool:
    """Whether the operator makes of a constant image the same constant, or there is no shift to ask for."""
    if not bool(pair[1].any()):
        return True
    if is_call(node, aten.pad):
        return False
    if is_call(node, aten.avg_pool2d, aten.avg_pool1d):
        padded = any(argument(node, "padding", [0]))
        return not (padded and argument(node, "count_include_pad")) and not argument(node, "divisor_override")
    return True


def _axes(rewrite: Rewrite, node: Node) -> frozenset[int] | None:
    """The axes of its input, counted from the front, along which the operator mixes, or moves, values."""
    rank = len(rewrite.shape(node.args[0]))  # type: ignore[arg-type]
    if is_call(node, aten.mean):
        given = argument(node, "dim")
        return (
            frozenset(axis % rank for axis in (range(rank) if given is None else given))
            if is_call(node, aten.mean.dim)
            else None
        )
    if is_call(node, *_ROLLS):
        return frozenset(axis % rank for axis in argument(node, "dims", []))
    if is_call(node, aten.pad):
        count = len(argument(node, "pad")) // 2
        plain = argument(node, "mode") == "constant" and not argument(node, "value")
        return frozenset(range(rank - count, rank)) if plain else None
    one = is_call(node, aten.adaptive_avg_pool1d, aten.avg_pool1d)
    return frozenset(range(rank - (1 if one else 2), rank))


def permutation(node: Node, rank: int) -> list[int]:
    """Which axis of its input each axis of the result is."""
    order = list(range(rank))
    if is_call(node, aten.permute):
        return [axis % rank for axis in argument(node, "dims")]
    one, other = argument(node, "dim0") % rank, argument(node, "dim1") % rank
    order[one], order[other] = other, one
    return order


def _reshaped(rewrite: Rewrite, pair: Pair, here: Any, there: Any) -> Pair | None:
    one, other = (_of_one_image(rewrite, node) for node in (here, there))
    moved = _each(pair, lambda tensor: _shrunk(tensor.expand(one).reshape(other)))
    batched = rewrite.batched(there)
    return None if any(tensor.ndim and batched in long_axes(tensor) for tensor in moved) else moved


def _of_one_image(rewrite: Rewrite, node: Any) -> list[int]:
    two, three = (held.shape for held in rewrite.held(node))
    return [2 * a - b for a, b in zip(two, three, strict=True)]


def _shrunk(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor with one entry along every axis on which it does not differ."""
    for axis in range(tensor.ndim):
        first = tensor.narrow(axis, 0, 1)
        if bool((tensor == first).all()):
            tensor = first
    return tensor


def _with_axes(tensor: torch.Tensor, axes: list[int]) -> torch.Tensor:
    for axis in axes:
        tensor = tensor.unsqueeze(axis)
    return tensor


def _each(pair: Pair, function: Any) -> Pair:
    scale, shift = (function(tensor) if tensor.ndim else tensor for tensor in pair)
    return scale, shift
