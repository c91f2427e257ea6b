"""Cut q, k and v out of one Linear without moving the axis that counts them.

    x (B, N, 3, h, d): permute to (3, B, h, N, d), then take 0, 1 and 2      five axes moved, three reads
    x (B, N, 3 h, d): permute to (B, 3 h, N, d), then split along 3 h        four axes moved, one split

An engine builds a Slice and a Squeeze with index arithmetic for each piece of the first and one Split for the
second. It holds for any number of pieces, in any order of the other axes, where the axis that is cut stands
right before the heads.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.engine.pieces import Piece, pieces_of
from vmkd_fx.passes.fold.moves import RESHAPES, permutation
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, is_call

aten = torch.ops.aten


@dataclass(frozen=True)
class _Heads:
    """A permuted reshape that is cut along its first axes' one, and how it is done in one axis less.

    Attributes:
        source: what is reshaped.
        shape: of four axes for five; -1 for the batch.
        order: the permutation of these.
        axis: where the heads are after it.
        heads: how many there are in a piece.
        pieces: who reads the result.
    """

    source: Node
    shape: list[int]
    order: list[int]
    axis: int
    heads: int
    pieces: list[Piece]


def split_heads(rewrite: Rewrite) -> None:
    """Rewrite `reshape, permute, unbind` as `reshape, permute, split`."""
    if rewrite.target.kind == "torch":
        return
    for node in rewrite.calls(aten.permute, aten.transpose):
        found = _heads(rewrite, node)
        if isinstance(found, str):
            rewrite.refuse(node, found)
        elif found is not None and rewrite.take(node, "heads split along one axis"):
            _write(rewrite, found)


SPLIT_HEADS = LoweringPass("split_heads", split_heads)


def _heads(rewrite: Rewrite, node: Node) -> _Heads | str | None:
    """How to cut `node` differently; None where it is not cut, a reason where that must stay."""
    pieces = pieces_of(rewrite, node)
    if not pieces or len(pieces) < 2 or any(piece.keeps_axis for piece in pieces):
        return None
    (axis, *others) = {piece.axis for piece in pieces}
    reshape: Any = node.args[0]
    if others or not is_call(reshape, *RESHAPES) or len(reshape.users) > 1:
        return "it is cut along several axes, or no reshape makes it alone"
    lengths = _lengths(rewrite, reshape)
    order = permutation(node, len(lengths))
    cut = order[axis]
    if cut + 1 == len(lengths) or -1 in lengths[cut : cut + 2]:
        return "the axis that it is cut along does not stand before the heads"
    shape = [*lengths[:cut], lengths[cut] * lengths[cut + 1], *lengths[cut + 2 :]]
    fewer = [place - (place > cut) for place in order if place != cut]
    return _Heads(reshape.args[0], shape, fewer, fewer.index(cut), lengths[cut + 1], pieces)


def _write(rewrite: Rewrite, found: _Heads) -> None:
    value = rewrite.call(aten.reshape.default, found.source, found.shape)
    if found.order != sorted(found.order):
        value = rewrite.call(aten.permute.default, value, found.order)
    whole = rewrite.call(aten.split.Tensor, value, found.heads, found.axis)
    for piece in found.pieces:
        rewrite.replace(piece.node, rewrite.call(operator.getitem, whole, piece.start))


def _lengths(rewrite: Rewrite, node: Node) -> list[int]:
    return [-1 if axis == rewrite.batched(node) else edge for axis, edge in enumerate(rewrite.shape(node))]
