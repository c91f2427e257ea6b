"""The layout operators between two linear maps, followed with the axis of the channels.

A permutation takes the axis along; a reshape keeps it if the same number of values lies before it and it has
the same length. Written anew for another number of channels, a reshape names that number in its place.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.fold.moves import PERMUTES, RESHAPES, permutation
from vmkd_fx.passes.rewrite import Rewrite, argument, is_call

aten = torch.ops.aten

_WITH_SIZES = (aten.view, aten.reshape, aten._unsafe_view)


def layouts_before(node: Node) -> tuple[list[Node], Node]:
    """The layout operators that make the input of `node`, first to last, and what they begin with."""
    way: list[Node] = []
    source: Any = node.args[0]
    while is_call(source, *PERMUTES, *RESHAPES):
        way.append(source)
        source = source.args[0]
    return way[::-1], source


def axis_before(rewrite: Rewrite, way: list[Node], axis: int) -> int | None:
    """Which axis before the operators is this one behind them; None if it is no axis of its own there."""
    for node in reversed(way):
        found = _axis_of_input(rewrite, node, axis)
        if found is None:
            return None
        axis = found
    return axis


def written_on(rewrite: Rewrite, way: list[Node], source: Node, axis: int, channels: int) -> Node:
    """The operators anew on `source`, which has this many channels along `axis` behind them."""
    axes = []
    for node in reversed(way):
        axes.append(axis)
        found = _axis_of_input(rewrite, node, axis)
        assert found is not None
        axis = found
    for node, place in zip(way, reversed(axes), strict=True):
        args = _with_channels(rewrite, node, place, channels)
        source = rewrite.call(node.target, source, *args, **node.kwargs)
    return source


def _with_channels(rewrite: Rewrite, node: Node, axis: int, channels: int) -> list[Any]:
    """What a layout operator is given beside its input, for this many channels along `axis` behind it."""
    args = list(node.args[1:])
    if is_call(node, *_WITH_SIZES, aten.unflatten):
        place, first = (0, 0) if is_call(node, *_WITH_SIZES) else (1, int(argument(node, "dim")))
        sizes: list[Any] = list(args[place])  # type: ignore[arg-type]
        index = axis - first % len(rewrite.shape(node.args[0]))  # type: ignore[arg-type]
        if 0 <= index < len(sizes) and isinstance(sizes[index], int) and sizes[index] != -1:
            sizes[index] = channels
        args[place] = sizes
    return args


def _axis_of_input(rewrite: Rewrite, node: Node, axis: int) -> int | None:
    if is_call(node, *PERMUTES):
        return permutation(node, len(rewrite.shape(node)))[axis]
    before, behind = (rewrite.held(each) for each in (node.args[0], node))  # type: ignore[arg-type]
    for place, edge in enumerate(before[0].shape):
        same = edge == behind[0].shape[axis] and all(
            prod(one.shape[:place]) == prod(other.shape[:axis])
            for one, other in zip(before, behind, strict=True)
        )
        if same:
            return place
    return None
