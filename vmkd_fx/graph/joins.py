"""Where paths from one tensor meet again: residual sums and concatenations, found by dominators.

A join's source is the nearest tensor that every path from the images to the join comes through; its arms are
the paths between. A residual sum has an arm without work, the shortcut.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.fx import Node

from vmkd_fx.graph.shapes import Shape
from vmkd_fx.graph.traced import TracedModule

_PRODUCTS = {operator.mul, torch.mul, "mul"}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CONCATENATIONS = {torch.cat, torch.concat, torch.stack}


@dataclass(frozen=True)
class Arm:
    """One way from a join's source to the join: its last node, and its own nodes in graph order."""

    end: Node
    nodes: tuple[Node, ...]
    is_shortcut: bool


@dataclass(frozen=True)
class Join:
    """A sum or a concatenation of what was computed from one `source`."""

    source: Node
    node: Node
    is_sum: bool
    arms: tuple[Arm, ...]

    @property
    def is_residual(self) -> bool:
        """Whether it adds work to the stream that the work was computed from."""
        return self.is_sum and any(arm.is_shortcut for arm in self.arms) and bool(self.nodes)

    @cached_property
    def nodes(self) -> frozenset[Node]:
        """All nodes between the source and the join."""
        return frozenset(node for arm in self.arms for node in arm.nodes)


class DataFlow:
    """The tensors computed from the images, and through which of them all paths to each lead."""

    def __init__(self, module: TracedModule, shapes: Mapping[Node, Shape]) -> None:
        self.shapes = shapes
        self.order = {node: index for index, node in enumerate(module.graph.nodes)}
        self.modules = dict(module.named_modules())
        self._dominator: dict[Node, Node | None] = {}
        self._depth: dict[Node, int] = {}
        for node in module.graph.nodes:
            if not self._is_tensor(node):
                continue
            sources = [source for source in node.all_input_nodes if source in self._depth]
            if sources or node.op == "placeholder":
                nearest = self._nearest(sources)
                self._dominator[node] = nearest
                self._depth[node] = 0 if nearest is None else self._depth[nearest] + 1

    @cached_property
    def token_joins(self) -> list[Node]:
        """Concatenations along the tokens of an NLC stream, in graph order."""
        return [node for node in self.order if self._joins_tokens(node)]

    def __contains__(self, node: Node) -> bool:
        return node in self._depth

    def cuts(self, end: Node) -> list[Node]:
        """The tensors that everything on the way to `end` comes through, in order."""
        found: list[Node] = []
        node: Node | None = end
        while node is not None:
            found.append(node)
            node = self._dominator[node]
        return found[::-1]

    def joins(self) -> list[Join]:
        """Every sum and every concatenation of what one tensor was made into, in graph order."""
        found = []
        for node in self._depth:
            operands = self._operands(node)
            if len(operands) < 2:
                continue
            source = self._nearest(operands)
            if source is None:
                continue
            join = Join(source, node, node.target in _SUMS, tuple(self._arm(source, end) for end in operands))
            found.append(self._with_side_inputs(join) or join)
        return found

    def is_closed(self, join: Join) -> bool:
        """Whether the tensors between source and join are read nowhere else."""
        inside = join.nodes | {join.node}
        return all(
            user in inside or user not in self for node in join.nodes if node in self for user in node.users
        )

    def between(self, start: Node, end: Node) -> tuple[Node, ...]:
        """The nodes on paths from `start` to `end`, without `start`, in graph order."""
        earliest, seen, todo = self.order[start], {end}, [end]
        while todo:
            for source in todo.pop().all_input_nodes:
                if source not in seen and self.order[source] > earliest:
                    seen.add(source)
                    todo.append(source)
        reached = {start}
        for node in sorted(seen, key=self.order.__getitem__):
            if any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        return tuple(sorted(reached - {start}, key=self.order.__getitem__)) if end in reached else ()

    def _is_tensor(self, node: Node) -> bool:
        """Whether the node holds a tensor or several, rather than numbers."""
        if node in self.shapes or node.op == "placeholder":
            return True
        return any(user.target is operator.getitem and user in self.shapes for user in node.users)

    def _nearest(self, nodes: list[Node]) -> Node | None:
        """The nearest tensor through which the paths to all of `nodes` lead: one of them, or one before."""
        if not nodes:
            return None
        found: Node | None = nodes[0]
        for other in nodes[1:]:
            node: Node | None = other
            while node is not found and node is not None and found is not None:
                if self._depth[node] >= self._depth[found]:
                    node = self._dominator[node]
                else:
                    found = self._dominator[found]
            found = node if found is not None else None
        return found

    def _operands(self, node: Node) -> list[Node]:
        """The tensors (B, ..., ...) that a join puts together; sums of sums are taken apart."""
        if node.op not in ("call_function", "call_method"):
            return []
        if node.target in _CONCATENATIONS:
            given = node.args[0] if node.args else node.kwargs.get("tensors")
            items = given if isinstance(given, (tuple, list)) else ()
            return [n for n in items if isinstance(n, Node) and n in self and len(self.shapes[n]) > 2]
        if node.target not in _SUMS:
            return []
        operands = [n for n in node.args[:2] if isinstance(n, Node) and n in self]
        if any(len(self.shapes.get(n, ())) < 3 for n in operands):
            return []
        if len(node.users) == 1 and next(iter(node.users)).target in _SUMS and len(operands) > 1:
            follower = next(iter(node.users))
            if len([n for n in follower.args[:2] if isinstance(n, Node) and n in self]) > 1:
                return []  # taken apart there
        return [term for operand in operands for term in self._terms(operand)] if len(operands) > 1 else []

    def _terms(self, node: Node) -> list[Node]:
        if node.target in _SUMS and len(node.users) == 1 and node.op in ("call_function", "call_method"):
            operands = [n for n in node.args[:2] if isinstance(n, Node) and n in self]
            if len(operands) > 1:
                return [term for operand in operands for term in self._terms(operand)]
        return [node]

    def _with_side_inputs(self, join: Join) -> Join | None:
        """The residual sum whose work also reads what was computed before its stream: a mask, positions."""
        if not join.is_sum or join.is_residual or len(join.arms) != 2:
            return None
        stream, end = sorted((arm.end for arm in join.arms), key=self.order.__getitem__)
        nodes = self.between(stream, end)
        arms = (Arm(stream, (), True), Arm(end, nodes, False))
        return Join(stream, join.node, True, arms) if nodes else None

    def _arm(self, source: Node, end: Node) -> Arm:
        if end is source:
            return Arm(end, (), True)
        nodes = self.between(source, end)
        return Arm(end, nodes, all(self._hands_on(node) for node in nodes))

    def _joins_tokens(self, node: Node) -> bool:
        if node.target is not torch.cat or len(self.shapes.get(node, ())) != 3:
            return False
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        tensors = isinstance(parts, (tuple, list)) and all(part in self.shapes for part in parts)
        return tensors and dim in (1, -2)

    def _hands_on(self, node: Node) -> bool:
        """Whether a node is an Identity, a dropout or a product with a parameter: a scaled shortcut."""
        if node.op == "call_module":
            return isinstance(
                self.modules.get(str(node.target)), (nn.Identity, nn.modules.dropout._DropoutNd)
            )
        data = [source for source in node.all_input_nodes if source in self]
        return node.target in _PRODUCTS and len(data) == 1 and len(node.all_input_nodes) == 2
