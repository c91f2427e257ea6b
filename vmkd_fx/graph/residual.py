"""Residual sums in a graph: where a branch is added back to the stream that it was computed from."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Node

from vmkd_fx.graph.shapes import Shape
from vmkd_fx.graph.traced import TracedModule

_PRODUCTS = {operator.mul, torch.mul, "mul"}
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass(frozen=True)
class Residual:
    """`add = stream + branch(stream)`; `nodes` are the branch's own nodes in graph order."""

    stream: Node
    nodes: tuple[Node, ...]
    end: Node
    add: Node


def find_residuals(module: TracedModule, shapes: Mapping[Node, Shape]) -> list[Residual]:
    """Every residual sum, in graph order."""
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    modules = dict(module.named_modules())
    found = []
    for node in module.graph.nodes:
        if node.target not in _ADDITIONS or node.op == "get_attr" or len(node.args) < 2:
            continue
        operands = [n for n in node.args[:2] if isinstance(n, Node) and len(shapes.get(n, ())) > 2]
        if len(operands) < 2:
            continue
        stream, end, branch = _split(operands, modules, order)
        if branch and shapes[stream] == shapes[node]:
            found.append(Residual(stream, branch, end, node))
    return found


def _split(
    operands: list[Node], modules: Mapping[str, nn.Module], order: Mapping[Node, int]
) -> tuple[Node, Node, tuple[Node, ...]]:
    """Which operand is the stream and which the branch's end; the shortcut may hide behind an Identity of its
    own.
    """
    while True:
        stream, end = sorted(operands, key=order.__getitem__)
        branch = _between(stream, end, order)
        sources = ((node, _hands_on(node, modules)) for node in (stream, end))
        behind = {node: source for node, source in sources if source is not None}
        if branch or not behind:
            return stream, end, branch
        shortcut = end if end in behind else stream
        operands = [behind[node] if node is shortcut else node for node in operands]


def _hands_on(node: Node, modules: Mapping[str, nn.Module]) -> Node | None:
    """What an Identity, a dropout or a product with a parameter (a scaled shortcut) is computed from."""
    if node.op == "call_module":
        passing = isinstance(modules.get(str(node.target)), (nn.Identity, nn.modules.dropout._DropoutNd))
        return node.all_input_nodes[0] if passing else None
    data = [source for source in node.all_input_nodes if _origin(source).op != "get_attr"]
    return data[0] if node.target in _PRODUCTS and len(data) == 1 and len(node.all_input_nodes) == 2 else None


def _origin(node: Node) -> Node:
    """The node behind reshapes."""
    while node.op == "call_method" and node.target in ("view", "reshape") and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _between(start: Node, end: Node, order: Mapping[Node, int]) -> tuple[Node, ...]:
    """The nodes on paths from `start` to `end`, both ends' work included, without `start`; empty if there is
    no path.
    """
    earliest, seen, todo = order[start], {end}, [end]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen and order[source] > earliest:
                seen.add(source)
                todo.append(source)
    reached = {start}
    for node in sorted(seen, key=order.__getitem__):
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return tuple(node for node in sorted(reached - {start}, key=order.__getitem__)) if end in reached else ()
