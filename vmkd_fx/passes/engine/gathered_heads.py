"""Queries, keys and values as gathers instead of a split, where an engine is built.

    q, k, v = split(x, h, axis=1)        x (B, 3 h, N, d)
    q = gather(x, [0, ..., h - 1], axis=1), and so on

The same numbers move. Where the batch is dynamic, TensorRT's parser works out the bounds of every piece of a
split in layers of shape arithmetic, and a gather by constants needs none. The engine that is built has as
many kernels either way: both are part of the one that carries heads to where attention reads them. Other
splits stay: their pieces an engine can often read where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.cleanup.views import is_view
from vmkd_fx.passes.engine.pieces import SPLITS, Piece, pieces_of
from vmkd_fx.passes.fold.holders import holder_of
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, is_call
from vmkd_fx.target import ENGINE_KINDS

aten = torch.ops.aten


def gather_heads(rewrite: Rewrite) -> None:
    """Replace every split of a Linear's result into heads."""
    if rewrite.target.kind not in ENGINE_KINDS:
        return
    for node in rewrite.calls(*SPLITS):
        found = _pieces(rewrite, node)
        if isinstance(found, str):
            rewrite.refuse(node, found)
        elif found and rewrite.take(node, f"{len(found)} gathers"):
            for piece in found:
                places = rewrite.put(torch.arange(piece.start, piece.stop, dtype=torch.int32))
                by = rewrite.call(aten.index_select.default, piece.source, piece.axis, places)
                rewrite.replace(piece.node, by)


GATHERED_HEADS = LoweringPass(
    "gathered_heads",
    gather_heads,
    {
        "split_heads": "it looks for what that leaves",
        "score_scale": "a scale finds its way through a split",
    },
)


def _pieces(rewrite: Rewrite, node: Node) -> list[Piece] | str | None:
    """What the split hands out; None where that is no attention's, a reason where it has to stay."""
    source: Any = node.args[0]
    if len(rewrite.shape(source)) != 4 or rewrite.batched(source) != 0:
        return None
    maker, moved = source, False
    while is_view(maker):
        moved |= is_call(maker, aten.permute, aten.transpose)
        maker = maker.args[0]
    holder = holder_of(rewrite, maker)
    if not moved or isinstance(holder, str) or holder.kind != "linear":
        return None
    pieces = pieces_of(rewrite, source)
    if pieces is None or not all(piece.keeps_axis for piece in pieces):
        return f"{source} is read whole, too"
    return pieces
