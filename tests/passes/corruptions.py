"""What can be wrong with the result of a lowering pass, done to it on purpose.

A pass is taken as it is and its products are spoiled afterwards: the values of new nodes, new constants, and
whatever an old node reads that it did not read before. This needs no knowledge of the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.fx import Node

from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument, is_call

aten = torch.ops.aten

Corruption = Callable[[Rewrite, Node], None]


def flipped_sign(rewrite: Rewrite, node: Node) -> None:
    _instead(rewrite, node, aten.neg.default)


def one_percent(rewrite: Rewrite, node: Node) -> None:
    _instead(rewrite, node, aten.mul.Scalar, 1.01)


def wrong_axis(rewrite: Rewrite, node: Node) -> None:
    """Two axes of one length trade places; where no two are of one length, the last one runs backwards."""
    shape = rewrite.shape(node)
    batched = rewrite.batched(node)
    for second in reversed(range(len(shape))):
        for first in reversed(range(second)):
            if batched not in (first, second) and shape[first] == shape[second] > 1:
                return _instead(rewrite, node, aten.transpose.int, first, second)
    longest = max(
        (axis for axis in range(len(shape)) if axis != batched), key=lambda axis: (shape[axis], axis)
    )
    return _instead(rewrite, node, aten.flip.default, [longest])


def dropped_bias(rewrite: Rewrite, node: Node) -> None:
    """The bias of a layer or a norm, the constant of a sum; of what has neither, a shift is missing."""
    if hasattr(node.target, "_schema") and isinstance(argument(node, "bias"), Node):
        names = [declared.name for declared in node.target._schema.arguments]  # type: ignore[union-attr]
        place = names.index("bias")
        if place < len(node.args):
            node.update_arg(place, None)
        else:
            node.update_kwarg("bias", None)
    elif is_call(node, aten.add) and rewrite.constant(node.args[1]) is not None:
        node.replace_all_uses_with(node.args[0])
    else:
        _instead(rewrite, node, aten.sub.Scalar, 0.05)


CORRUPTIONS: dict[str, Corruption] = {
    "dropped bias": dropped_bias,
    "flipped sign": flipped_sign,
    "one percent": one_percent,
    "wrong axis": wrong_axis,
}


def corrupted(lowering_pass: LoweringPass, corruption: Corruption, product: int) -> LoweringPass:
    """The pass, with one of its products spoiled: the one at this place among `products`."""

    def run(rewrite: Rewrite) -> None:
        for node in products(lowering_pass, rewrite)[product:][:1]:
            corruption(rewrite, node)

    return replace(lowering_pass, run=run)


def products(lowering_pass: LoweringPass, rewrite: Rewrite) -> list[Node]:
    """Run the pass; the nodes of the result that hold real numbers and are the pass's own work."""
    before = {node: (node.args, node.kwargs) for node in rewrite.graph.nodes}
    lowering_pass.run(rewrite)
    found: dict[Node, None] = {}
    for node in rewrite.graph.nodes:
        if node not in before:
            found[node] = None
        elif (node.args, node.kwargs) != before[node]:
            old = _read(before[node])
            found.update(dict.fromkeys(read for read in node.all_input_nodes if read not in old))
    return [node for node in found if node.users and _real(rewrite, node)]


def _read(arguments: object) -> set[Node]:
    read: set[Node] = set()
    torch.fx.node.map_arg(arguments, lambda node: read.add(node) or node)
    return read


def _real(rewrite: Rewrite, node: Node) -> bool:
    value = rewrite.held(node)[0]
    dtype = getattr(value, "dtype", None)
    return dtype is not None and dtype.is_floating_point and value.shape.numel() > 1


def _instead(rewrite: Rewrite, node: Node, operator: object, *rest: object) -> None:
    with rewrite.graph.inserting_after(node):
        spoiled = rewrite.graph.call_function(operator, (node, *rest))  # type: ignore[arg-type]
    node.replace_all_uses_with(spoiled, delete_user_cb=lambda user: user is not spoiled)
