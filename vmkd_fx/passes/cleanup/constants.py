"""Fold constants: what no image reaches is computed once, in float64.

Relative position biases, resized position embeddings, weights computed from weights, views of parameters.
What draws random numbers is left to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from vmkd_fx.graph.functional import writes
from vmkd_fx.passes.rewrite import ATTRIBUTES, LoweringPass, Rewrite


def fold_constants(rewrite: Rewrite) -> None:
    """Put a constant in the place of every node that depends on constants alone."""
    values: dict[Node, Any] = {}
    for node in list(rewrite.graph.nodes):
        if (known := rewrite.constant(node)) is not None:
            values[node] = known
        elif _may_be_computed(node) and all(source in values for source in node.all_input_nodes):
            args, kwargs = (map_arg(given, values.__getitem__) for given in (node.args, node.kwargs))
            values[node] = node.target(*args, **kwargs)
    for node in list(rewrite.graph.nodes):
        value = values.get(node)
        is_last = any(user not in values for user in node.users)
        if node.op != "call_function" or not is_last or not isinstance(value, torch.Tensor):
            continue
        if rewrite.take(node, "constant"):
            rewrite.replace(node, rewrite.put(value, like=f"{ATTRIBUTES}.{node.name}"))


CONSTANTS = LoweringPass("constants", fold_constants)


def _may_be_computed(node: Node) -> bool:
    if node.op != "call_function" or writes(node):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags
