"""The normaliser of a linear attention as a sum of the keys, where an engine is built.

    q @ (k @ [v | 1]) = [q @ (k @ v) | q @ sum(k)]        k (.., d, N), v (.., N, d), the sum over N

EfficientViT (arXiv:2205.14756, eq. 4) divides by the second part, and timm computes both in one product by a
column of ones beside v. The parts are cut apart again right behind it, so the column only costs a padding,
whose shape TensorRT's parser works out in layers of arithmetic where the batch is dynamic, and two cuts.
It rounds to 1e-16 in float64.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from vmkd_fx.graph.sizes import forget
from vmkd_fx.passes.engine.pieces import pieces_of
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument, is_call
from vmkd_fx.target import ENGINE_KINDS

aten = torch.ops.aten


def sum_keys(rewrite: Rewrite) -> None:
    """Replace both parts of each product that has a column of ones in it."""
    if rewrite.target.kind not in ENGINE_KINDS:
        return
    for pad in rewrite.calls(aten.pad):
        if argument(pad, "mode") != "constant" or argument(pad, "value") != 1:
            continue
        right = _as_read(pad)
        inner = _product_of(right) if list(argument(pad, "pad")) == [0, 1] else None
        outer = None if inner is None else _product_of(inner)
        parts = None if outer is None else _parts(rewrite, outer)
        if inner is None or outer is None or parts is None:
            rewrite.refuse(pad, "its ones do not become a column of a product that is cut off again")
        elif rewrite.take(outer, "its normaliser is a sum of keys"):
            queries, keys = outer.args[0], inner.args[0]
            product = rewrite.call(aten.matmul.default, keys, _without(pad, right))
            total = rewrite.call(aten.sum.dim_IntList, keys, [-1], True)
            for part, column in zip(parts, (product, total), strict=True):
                for node in part:
                    rewrite.replace(node, rewrite.call(aten.matmul.default, queries, column))


ONES_COLUMN = LoweringPass(
    "ones_column", sum_keys, {"views": "slices of everything stand between a product and who cuts it"}
)


def _as_read(pad: Node) -> Node:
    """`pad`, or the cast of it that everybody reads."""
    reader = next(iter(pad.users))
    return reader if len(pad.users) == 1 and is_call(reader, aten.to, aten._to_copy) else pad


def _without(pad: Node, right: Node) -> Node:
    """What is padded, cast as `right` is."""
    source = pad.args[0]
    assert isinstance(source, Node)
    if right is pad:
        return source
    right.replace_input_with(pad, source)
    forget(right)  # its shape of before
    return right


def _product_of(right: Node) -> Node | None:
    """The product that alone reads `right`, as its right operand."""
    reader = next(iter(right.users))
    sole = len(right.users) == 1 and is_call(reader, aten.matmul) and reader.args[1] is right
    return reader if sole and reader.args[0] is not right else None


def _parts(rewrite: Rewrite, product: Node) -> tuple[list[Node], list[Node]] | None:
    """Who reads all columns but the last, and who reads the last; None where somebody reads otherwise."""
    axis = len(rewrite.shape(product)) - 1
    last = rewrite.shape(product)[axis] - 1
    parts: dict[tuple[int, int, int], list[Node]] = {(axis, 0, last): [], (axis, last, last + 1): []}
    for piece in pieces_of(rewrite, product) or ():
        place = (piece.axis, piece.start, piece.stop)
        if place not in parts or not piece.keeps_axis:
            return None
        parts[place].append(piece.node)
    before, behind = parts.values()
    return (before, behind) if before and behind else None
