"""Pieces of a value along one axis: what `unbind`, `select`, `split`, `chunk` and `slice` hand out."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.rewrite import Rewrite, argument, is_call

aten = torch.ops.aten

SPLITS = (aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split)


@dataclass(frozen=True)
class Piece:
    """Entries `start` to `stop` of `source` along `axis`, which the piece has too if it `keeps_axis`."""

    node: Node
    source: Node
    axis: int
    start: int
    stop: int
    keeps_axis: bool


def piece_of(rewrite: Rewrite, node: Any) -> Piece | None:
    """The node as a piece of another; None if it is none, or not along an axis of known length."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _item(rewrite, node)
    if not is_call(node, aten.select, aten.slice):
        return None
    source: Any = node.args[0]
    axis, length = _axis(rewrite, node, source)
    if is_call(node, aten.select):
        index = argument(node, "index")
        return Piece(node, source, axis, index % length, index % length + 1, False)
    given = (argument(node, "start", 0), argument(node, "end", length), argument(node, "step", 1))
    known = all(isinstance(number, int) for number in given) and given[2] == 1
    if not known or rewrite.batched(source) == axis:
        return None
    start, stop, _ = slice(*given).indices(length)
    return Piece(node, source, axis, start, stop, True)


def pieces_of(rewrite: Rewrite, source: Node) -> list[Piece] | None:
    """Everybody who reads `source`, as pieces; None if somebody reads it otherwise."""
    readers: list[Node] = []
    for user in source.users:
        readers += list(user.users) if is_call(user, aten.unbind, *SPLITS) else [user]
    pieces = [piece for reader in readers if (piece := piece_of(rewrite, reader)) and piece.source is source]
    return pieces if len(pieces) == len(readers) else None


def length_of_one(rewrite: Rewrite, node: Node) -> list[int]:
    """The shape of what belongs to one image; an axis that holds the batch has what each image adds to it."""
    two, three = (held.shape for held in rewrite.held(node))
    return [other - one or one for one, other in zip(two, three, strict=True)]


def grown(rewrite: Rewrite, piece: Piece, factor: torch.Tensor) -> torch.Tensor | str:
    """A factor of the piece as one of its source, one everywhere else; a reason where that is wrong."""
    if rewrite.batched(piece.source) == piece.axis:
        return f"{piece.node} takes single images"
    others = pieces_of(rewrite, piece.source)
    if others is None:
        return f"{piece.source} before it is read whole, too"
    for other in others:
        apart = other.stop <= piece.start or piece.stop <= other.start
        if other.node is not piece.node and (other.axis != piece.axis or not apart):
            return f"{other.node} reads what {piece.node} does"
    shape = length_of_one(rewrite, piece.source)
    whole = torch.ones(shape, dtype=torch.float64)
    if factor.ndim and not piece.keeps_axis:
        factor = factor.unsqueeze(piece.axis)
    part = whole.narrow(piece.axis, piece.start, piece.stop - piece.start)
    part.copy_(factor.expand(part.shape))
    return whole


def _item(rewrite: Rewrite, node: Node) -> Piece | None:
    parent, index = node.args
    if not isinstance(parent, Node) or not isinstance(index, int):
        return None
    if is_call(parent, aten.unbind):
        axis, length = _axis(rewrite, parent, parent.args[0])
        return Piece(node, parent.args[0], axis, index % length, index % length + 1, False)  # type: ignore[arg-type]
    if not is_call(parent, *SPLITS):
        return None
    source = parent.args[0]
    assert isinstance(source, Node)
    axis, _ = _axis(rewrite, parent, source)
    if rewrite.batched(source) == axis:
        return None
    edges = [item.shape[axis] for item in rewrite.held(parent)[0]]
    index %= len(edges)
    return Piece(node, source, axis, sum(edges[:index]), sum(edges[: index + 1]), True)


def _axis(rewrite: Rewrite, node: Node, source: Any) -> tuple[int, int]:
    """The axis that `node` takes pieces along, and how long it is for a batch of two."""
    shape = rewrite.shape(source)
    axis = argument(node, "dim", 0) % len(shape)
    return axis, shape[axis]
