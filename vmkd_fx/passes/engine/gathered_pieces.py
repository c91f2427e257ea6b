"""Pieces of a value as gathers instead of splits and slices, where an engine is built.

    x1, x2 = split(x, [16, 48], axis=1)        x (B, 64, H, W)
    x1, x2 = gather(x, [0, ..., 15], axis=1), gather(x, [16, ..., 63], axis=1)

The same numbers move. Where the batch is dynamic, TensorRT's parser works out the bounds of every piece in
layers of shape arithmetic, and a gather by constants needs none.
"""

from __future__ import annotations

import torch

from vmkd_fx.passes.engine.pieces import SPLITS, piece_of
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, is_call
from vmkd_fx.target import ENGINE_KINDS

aten = torch.ops.aten


def gather_pieces(rewrite: Rewrite) -> None:
    """Replace every split, and every slice, along an axis that is not the batch."""
    if rewrite.target.kind not in ENGINE_KINDS:
        return
    for node in rewrite.calls(aten.slice, *SPLITS):
        reads = [node] if is_call(node, aten.slice) else list(node.users)
        pieces = [piece for read in reads if (piece := piece_of(rewrite, read))]
        if len(pieces) == len(reads) and rewrite.take(node, f"{len(reads)} gathers"):
            for piece in pieces:
                places = rewrite.put(torch.arange(piece.start, piece.stop, dtype=torch.int32))
                by = rewrite.call(aten.index_select.default, piece.source, piece.axis, places)
                rewrite.replace(piece.node, by)


GATHERED_PIECES = LoweringPass(
    "gathered_pieces",
    gather_pieces,
    {
        "split_heads": "it looks for what that leaves",
        "score_scale": "a scale finds its way through a split",
        "channels_first": "a layout finds its way through a split",
        "flat_tokens": "tokens are laid flat through a split",
    },
)
