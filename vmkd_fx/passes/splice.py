"""Plain torch code as nodes of a graph: a pass writes what it means, and the exporter spells it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from vmkd_fx.graph.rules import Sized


def splice(
    graph: Graph,
    point: Node,
    function: Callable[..., torch.Tensor],
    nodes: Sequence[Node],
    held: Sequence[tuple[Sized, Sized]],
) -> Node:
    """Insert `function(*nodes)` before `point`; returns the node of its result.

    Args:
        function: takes and gives tensors; it must not read values, and may be given any batch.
        held: shapes of the nodes for two batch sizes, of which those axes that differ stay symbolic.
    """
    exported = _exported(function, held)
    copies: dict[Node, Node] = dict(
        zip((node for node in exported.nodes if node.op == "placeholder"), nodes, strict=True)
    )
    with graph.inserting_before(point):
        for node in exported.nodes:
            if node.op == "output":
                return copies[node.args[0][0]]
            if node.op == "call_function" and node.users:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].meta.clear()
    raise AssertionError("an exported graph ends with its output")


def _exported(function: Callable[..., torch.Tensor], held: Sequence[tuple[Sized, Sized]]) -> Graph:
    class Body(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return function(*tensors)

    examples = tuple(torch.empty(two.shape, dtype=two.dtype) for two, _ in held)
    dynamic = tuple(_dynamic_axes(two.shape, three.shape) for two, three in held)
    with torch.no_grad():
        program = torch.export.export(Body(), examples, dynamic_shapes=(dynamic,), strict=False)
    return program.graph


def _dynamic_axes(two: torch.Size, three: torch.Size) -> dict[int, Any]:
    grown = (axis for axis, (one, other) in enumerate(zip(two, three, strict=True)) if one != other)
    return {axis: torch.export.Dim.DYNAMIC for axis in grown}
