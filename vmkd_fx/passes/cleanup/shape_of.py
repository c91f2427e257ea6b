"""Write a reshape to the shape of another value with numbers, and -1 for the batch.

    reshape_as(y, x), x of shape (B, N, C) = reshape(y, (-1, N, C))

The other value is then no longer read for its shape alone, so that what makes it can change: LeViT's
BatchNorm of tokens, `bn(x.flatten(0, 1)).reshape_as(x)`, folds into the Linear that makes x. Exact.
"""

from __future__ import annotations

import torch

from vmkd_fx.passes.rewrite import LoweringPass, Rewrite

aten = torch.ops.aten


def name_shapes(rewrite: Rewrite) -> None:
    """Name the shape where another value stands for it."""
    for node in rewrite.calls(aten.reshape_as, aten.view_as):
        batch = rewrite.batched(node)
        sizes = [-1 if axis == batch else edge for axis, edge in enumerate(rewrite.shape(node))]
        if rewrite.take(node, "to a shape in numbers"):
            rewrite.replace(node, rewrite.call(aten.reshape.default, node.args[0], sizes))


SHAPE_OF = LoweringPass("shape_of", name_shapes)
