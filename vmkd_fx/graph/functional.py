"""Operators that write into an operand, in favour of those that return a new value.

    relu_(x); f(x)          becomes          y = relu(x); f(y)

It is safe where nothing else holds the same memory: no view of the operand, and the operand no view itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node


def write_nothing(graph: Graph) -> bool:
    """Replace what writes in place, in place; False if some of it cannot be, the graph is then as it was."""
    writing = [node for node in graph.nodes if writes(node)]
    if not all(_alone(node) for node in writing):
        return False
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in writing:
        operand = node.args[0]
        assert isinstance(operand, Node)
        with graph.inserting_before(node):
            made = graph.call_function(_functional(node.target), node.args, node.kwargs)
        made.meta.update(node.meta)
        order[made] = order[node]
        for user in list(operand.users):
            if order[user] > order[node]:
                user.replace_input_with(operand, made)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    return True


def writes(node: Node) -> bool:
    """Whether a node's operator writes into one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _alone(node: Node) -> bool:
    """Whether the operand that is written into has its memory for itself."""
    operand = node.args[0] if node.args else None
    if not isinstance(operand, Node) or operand.op != "call_function" or _functional(node.target) is None:
        return False
    if _may_be_a_view(operand) and not writes(operand):
        return False
    others = (user for user in operand.users if user is not node)
    return not any(_may_be_a_view(user) and not writes(user) for user in others)


def _may_be_a_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True  # an item of several results
    return any(declared.alias_info is not None for declared in schema.arguments)


def _functional(target: Any) -> Any:
    """`relu` for `relu_`, in the overload that takes the same arguments; None if there is none."""
    schema = target._schema
    name = schema.name.split("::")[1]
    writing = [
        declared
        for declared in schema.arguments
        if declared.alias_info is not None and declared.alias_info.is_write
    ]
    if not name.endswith("_") or len(writing) != 1 or writing[0] is not schema.arguments[0]:
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, target._overloadname, None)
