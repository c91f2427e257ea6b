"""Which rows of a Linear make the queries, the keys or the values of attention.

Between the Linear and the product stand reshapes, permutations and cuts. Numbers that name the places in the
Linear's result are sent through them; if what arrives at (image, head, token, place) is always this token's
number of this head and place, the operand is a Linear of those rows.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from vmkd_fx.passes.cleanup.views import is_view
from vmkd_fx.passes.engine.pieces import SPLITS
from vmkd_fx.passes.fold.holders import Holder, holder_of
from vmkd_fx.passes.rewrite import Rewrite, is_call

aten = torch.ops.aten

_CUTS = (aten.unbind, aten.select, aten.slice, *SPLITS)


@dataclass(frozen=True)
class Operand:
    """Queries, keys or values as rows of a Linear.

    Attributes:
        holder: the Linear.
        way: the nodes between it and the product.
        rows: of its weight, head by head.
        heads, tokens: how many there are.
    """

    holder: Holder
    way: frozenset[Node]
    rows: torch.Tensor
    heads: int
    tokens: int


def operand_of(rewrite: Rewrite, value: Any, order: Sequence[int]) -> Operand | str:
    """`value`, permuted by `order` to (B, h, N, d), as rows of a Linear; a reason where it is none."""
    way: list[Node] = []
    node = value
    while is_view(node) or is_call(node, *_CUTS) or _is_item(node):
        way.insert(0, node)
        node = node.args[0]
    holder = holder_of(rewrite, node)
    if isinstance(holder, str):
        return holder
    if holder.kind != "linear":
        return f"{node} is no Linear"
    shape = rewrite.shape(node)
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    places: dict[Node, Any] = {node: numbers}
    for step in way:
        given: Any = map_arg((step.args, step.kwargs), places.__getitem__)
        places[step] = step.target(*given[0], **given[1])  # type: ignore[operator]
    arrived = places[value].permute(*order)
    images, heads, tokens, _ = arrived.shape
    outputs = shape[-1]
    rows = arrived[0, :, 0] % outputs
    token = torch.arange(images * tokens).reshape(images, 1, tokens, 1)
    if images * tokens * outputs != numbers.numel() or not torch.equal(
        arrived, token * outputs + rows[None, :, None]
    ):
        return f"{value} mixes the tokens of {node}"
    return Operand(holder, frozenset((node, *way)), rows.flatten(), heads, tokens)


def read_elsewhere(rewrite: Rewrite, operands: Sequence[Operand], products: set[Node]) -> str | None:
    """Who reads what the Linears make beside the products; None if nobody does."""
    known = products.union(*(operand.way for operand in operands))
    for operand in operands:
        for node in operand.way:
            for user in node.users:
                if user not in known:
                    return f"{user.name} reads {node.name}, too"
    return None


def _is_item(node: Any) -> bool:
    return isinstance(node, Node) and node.target is operator.getitem and is_call(node.args[0], *_CUTS)
