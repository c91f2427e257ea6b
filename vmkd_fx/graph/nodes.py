"""A graph as plain data, from which the same graph is built again: names, order and owners included.

torch.fx pickles the code instead and traces it anew, which gives nodes other names, runs whatever does not
come from the images and forgets which module a node belongs to.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

_OPERATORS = "torch.ops"
"""Stands for the module of an operator, which is no module of Python's."""

OWNER = "vmkd_owner"
"""In a node's meta: the path of the module whose forward holds it."""

METHOD = "vmkd_method"
"""In a node's meta: the path of the method that makes it, where a forward calls one of another module."""


@dataclass(frozen=True)
class Reference:
    """Stands for the node of this name among another node's arguments."""

    name: str


@dataclass(frozen=True)
class Named:
    """Stands for a function by where it is found; some of torch's cannot be pickled themselves."""

    module: str
    name: str


@dataclass(frozen=True)
class PlainNode:
    """A node without its links."""

    kind: str
    target: Any
    args: Any
    kwargs: Any
    name: str
    type: Any
    owner: str | None
    wrapped: bool


def plain_nodes(graph: Graph) -> list[PlainNode]:
    """The nodes in order, as data that can be pickled."""
    return [
        PlainNode(
            node.op,
            _named(node.target),
            map_aggregate(node.args, _reference),
            map_aggregate(node.kwargs, _reference),
            node.name,
            node.type,
            node.meta.get(OWNER),
            bool(node.meta.get("is_wrapped", False)),
        )
        for node in graph.nodes
    ]


def graph_of(nodes: list[PlainNode], tracer: type[Any] | None = None) -> Graph:
    """The graph that `plain_nodes` was given."""
    graph = Graph(tracer_cls=tracer)
    built: dict[str, Any] = {}

    def linked(value: Any) -> Any:
        return built[value.name] if isinstance(value, Reference) else value

    for plain in nodes:
        args, kwargs = map_aggregate(plain.args, linked), map_aggregate(plain.kwargs, linked)
        node = built[plain.name] = graph.create_node(
            plain.kind, _found(plain.target), args, kwargs, plain.name, plain.type
        )
        if plain.owner is not None:
            node.meta[OWNER] = plain.owner
        if plain.wrapped:  # torch.fx's mark of a function that is not looked into
            node.meta["is_wrapped"] = True
    return graph


def _named(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return Named(_OPERATORS, f"{target.namespace}.{target._opname}.{target._overloadname}")
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", None)
    found = getattr(sys.modules.get(module or ""), name or "", None)
    return Named(str(module), str(name)) if found is target and callable(target) else target


def _found(target: Any) -> Any:
    if not isinstance(target, Named):
        return target
    if target.module == _OPERATORS:
        return reduce(getattr, target.name.split("."), torch.ops)
    return getattr(importlib.import_module(target.module), target.name)


def _reference(value: Any) -> Any:
    return Reference(value.name) if isinstance(value, Node) else value
