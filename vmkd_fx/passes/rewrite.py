"""What a lowering pass works with: one graph of ATen operators, its shapes and constants, and a few verbs.

    def drop_double_negation(rewrite: Rewrite) -> None:
        for node in rewrite.calls(aten.neg):
            inner = node.args[0]
            if inner.target is aten.neg.default and rewrite.take(node, "two negations"):
                rewrite.replace(node, inner.args[0])

A tensor is never changed: what is new is put beside it, so a graph can be rewritten, compared with the one
before and thrown away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from vmkd_fx.errors import PassError
from vmkd_fx.graph.functional import writes
from vmkd_fx.graph.sizes import Sizes
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import attribute
from vmkd_fx.passes.splice import splice
from vmkd_fx.steps import Refusal, Site
from vmkd_fx.target import Target

ATTRIBUTES = "constants"


class Rewrite:
    """One pass at work on one graph.

    Attributes:
        module, graph: what is rewritten, in float64.
        target: what it is lowered for.
        sites: what the pass rewrote.
        refusals: what it looked at and left alone, by node.
    """

    def __init__(
        self,
        module: TracedModule,
        target: Target,
        *,
        spared: frozenset[str] = frozenset(),
        most: int | None = None,
    ) -> None:
        """`spared` sites are left alone, and so is everything once `most` sites are taken."""
        self.module = module
        self.graph = module.graph
        self.target = target
        self.sites: list[Site] = []
        self.refusals: dict[str, Refusal] = {}
        self._spared = spared
        self._most = most
        self._point: Node | None = None
        self._sizes = Sizes(module, module.info.need_input_size())
        self._written = {
            str(node.args[0].target)
            for node in self.graph.nodes
            if node.op == "call_function" and writes(node) and isinstance(node.args[0], Node)
        }
        self._paths = Counter(str(node.target) for node in self.graph.nodes if node.op == "get_attr")
        self._named: dict[int, tuple[Any, list[Node]]] = {}  # holds the tensors too: ids are used again
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self._name(node)

    def calls(self, *operators: Any) -> list[Node]:
        """The nodes that call one of these operators, `aten.add` or `aten.add.Tensor` say, in order."""
        return [node for node in self.graph.nodes if is_call(node, *operators)]

    def shape(self, node: Node) -> tuple[int, ...]:
        """Of the node's value, for a batch of two images."""
        return self._sizes.shape(node)

    def batched(self, node: Node) -> int | None:
        """The axis of the node's value that grows with the batch; None for a constant."""
        return self._sizes.batched(node)

    def held(self, node: Node) -> tuple[Any, Any]:
        """The node's value for two and for three images: shapes and dtypes of tensors, numbers as they
        are.
        """
        return self._sizes.held(node)

    def constant(self, node: Any) -> torch.Tensor | None:
        """The tensor of the model that a node reads; None for what is computed, or written while it runs."""
        if not isinstance(node, Node) or node.op != "get_attr" or str(node.target) in self._written:
            return None
        value = attribute(self.module, str(node.target))
        return value.detach() if isinstance(value, torch.Tensor) else None

    def readers(self, node: Node) -> int:
        """How many nodes read the tensor that the constant `node` names, under whatever name."""
        value = attribute(self.module, str(node.target))
        return sum(len(other.users) for other in self._named[id(value)][1])

    def take(self, node: Node, what: str = "") -> bool:
        """Claim a site; what is made from now on stands before `node`. False: leave it alone."""
        if node.name in self._spared or (self._most is not None and len(self.sites) >= self._most):
            return False
        self.sites.append(Site(node.name, what, where(node)))
        self.refusals.pop(node.name, None)
        self._point = node
        return True

    def at(self, node: Node) -> None:
        """Put what is made from now on before `node` instead."""
        self._point = node

    def refuse(self, node: Node, reason: str) -> None:
        """Say why a site that looks like one is left alone."""
        self.refusals[node.name] = Refusal(node.name, reason)

    def put(self, tensor: torch.Tensor, like: Node | str | None = None) -> Node:
        """A new constant; its path is that of the constant `like`, or `like` itself, where it is free."""
        path = self._free_path(like)
        holder, _, name = path.rpartition(".")
        parent = _submodule(self.module, holder)
        for held in (parent._parameters, parent._buffers):
            held.pop(name, None)
        tensor = tensor.detach().contiguous()
        if tensor.is_floating_point():
            parent.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            parent.register_buffer(name, tensor)
        with self.graph.inserting_before(self._here()):
            node = self.graph.get_attr(path)
        self._paths[path] = 1
        self._name(node)
        return node

    def call(self, operator: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node."""
        with self.graph.inserting_before(self._here()):
            return self.graph.call_function(operator, args, kwargs)

    def inline(self, function: Callable[..., torch.Tensor], *nodes: Node) -> Node:
        """`function(*nodes)` as new nodes: plain torch code, exported on tensors of these shapes."""
        return splice(self.graph, self._here(), function, nodes, [self.held(node) for node in nodes])

    def replace(self, node: Node, by: Node) -> None:
        """Let everybody who reads `node` read `by`."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def _here(self) -> Node:
        if self._point is None:
            raise PassError("a pass takes a site before it writes: if rewrite.take(node, what): ...")
        return self._point

    def _name(self, node: Node) -> None:
        value = attribute(self.module, str(node.target))
        self._named.setdefault(id(value), (value, []))[1].append(node)

    def _free_path(self, like: Node | str | None) -> str:
        """A path that nobody else reads."""
        wanted = (
            f"{ATTRIBUTES}.value" if like is None else str(like.target) if isinstance(like, Node) else like
        )
        if isinstance(like, Node) and self._paths[wanted] == 1 and len(like.users) == 1:
            return wanted  # by whoever is being replaced
        path, count = wanted, 1
        while _holds(self.module, path):
            count += 1
            path = f"{wanted}_{count}"
        return path


@dataclass(frozen=True)
class LoweringPass:
    """A step of `lower`.

    Attributes:
        name: in the ledger, and in `lower(passes=...)`.
        run: rewrites the graph that it is given.
        after: passes that must have run before it where they run at all, each with the reason.
    """

    name: str
    run: Callable[[Rewrite], None]
    after: Mapping[str, str] = field(default_factory=dict)


def is_call(node: Any, *operators: Any) -> bool:
    """Whether `node` calls one of these operators, whatever overload."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return any(node.target is operator or packet is operator for operator in operators)


def argument(node: Node, name: str, default: Any = None) -> Any:
    """The argument of this name in the operator's schema, as given or as it defaults to."""
    for position, declared in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if declared.name == name:
            given = (
                node.args[position]
                if position < len(node.args)
                else node.kwargs.get(name, declared.default_value)
            )
            return default if given is None else given
    return default


def where(node: Node) -> str:
    """The module of the model that a node belongs to, by the parameters that it or what it reads names."""
    for current in (node, *node.all_input_nodes):
        for source in current.all_input_nodes:
            if source.op == "get_attr" and not str(source.target).startswith(ATTRIBUTES):
                return str(source.target).rpartition(".")[0]
    return ""


def _submodule(module: nn.Module, path: str) -> nn.Module:
    for name in filter(None, path.split(".")):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        found = module._modules[name]
        assert found is not None
        module = found
    return module


def _holds(module: nn.Module, path: str) -> bool:
    holder, _, name = path.rpartition(".")
    for part in filter(None, holder.split(".")):
        found = module._modules.get(part)
        if found is None:
            return False
        module = found
    return hasattr(module, name)
