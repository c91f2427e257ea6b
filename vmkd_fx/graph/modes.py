"""One graph for train() and eval().

A trace freezes every read of `self.training`: a graph traced in training mode drops paths in evaluation too.
Here a model is traced in both modes and the two graphs are laid over each other. Where only a constant
differs (a rate, a flag), the constant becomes a `ModeSwitch` that returns the right one at run time. Where
the nodes of a module differ, that module is closed, which keeps its own flag; so is a single method of a
module that another one calls.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from vmkd_fx.errors import TraceError
from vmkd_fx.graph.edit import owner
from vmkd_fx.graph.nodes import METHOD, OWNER

_READS = (
    *(getattr, operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod),
    *(operator.truediv, operator.neg, operator.eq, operator.ne, operator.gt, operator.lt),
)


class ModeSwitch(nn.Module):
    """Returns one constant in training and another in evaluation."""

    def __init__(self, in_training: Any, in_evaluation: Any) -> None:
        super().__init__()
        self.in_training = in_training
        self.in_evaluation = in_evaluation

    def forward(self) -> Any:
        return self.in_training if self.training else self.in_evaluation

    def extra_repr(self) -> str:
        return f"train={self.in_training!r}, eval={self.in_evaluation!r}"


def drop_unread(graph: Graph) -> None:
    """Remove numbers, shapes and parameters that nobody reads: one mode may look at what another does not."""
    for node in reversed(list(graph.nodes)):
        reads = node.op == "get_attr" or node.target in _READS or str(node.target) in ("size", "dim")
        if reads and not node.users:
            graph.erase_node(node)


def differing_parts(training: Graph, evaluation: Graph) -> list[str]:
    """Paths of the modules, or of methods that others call, whose own nodes differ between the two traces.

    Nodes are the same when operation and target are.
    """
    left, right = _own_operations(training), _own_operations(evaluation)
    differing = {path for path in left.keys() | right.keys() if left.get(path) != right.get(path)}
    return sorted(differing or _wired_otherwise(training, evaluation))


def _maker(node: Node) -> str:
    return str(node.meta.get(METHOD) or owner(node))


def _own_operations(graph: Graph) -> dict[str, list[tuple[str, Any]]]:
    operations = defaultdict(list)
    for node in graph.nodes:
        operations[_maker(node)].append((node.op, node.target))
    return operations


def _wired_otherwise(training: Graph, evaluation: Graph) -> set[str]:
    """Modules and methods with the same operations in both graphs, one of which reads another node."""
    partners = dict(zip(training.nodes, evaluation.nodes, strict=True))
    return {
        _maker(node)
        for node, other in partners.items()
        if [partners[source] for source in node.all_input_nodes] != other.all_input_nodes
    }


def insert_mode_switches(root: nn.Module, training: Graph, evaluation: Graph) -> int:
    """Replace every constant of the graph `training` that differs in `evaluation` by a switch; return their
    number.

    Each switch is a submodule of the module that holds the node, so that freezing that module freezes it too.
    """
    partners = {
        in_evaluation: in_training
        for in_training, in_evaluation in zip(training.nodes, evaluation.nodes, strict=True)
    }
    count = 0
    for other, node in partners.items():

        def merged(ours: Any, theirs: Any, node: Node = node) -> Any:
            nonlocal count
            if isinstance(ours, Node) and partners.get(theirs) is ours:
                return ours
            if (
                isinstance(ours, (tuple, list))
                and isinstance(theirs, type(ours))
                and len(ours) == len(theirs)
            ):
                return type(ours)(merged(one, two) for one, two in zip(ours, theirs, strict=True))
            if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
                return {key: merged(ours[key], theirs[key]) for key in ours}
            if isinstance(ours, slice) and isinstance(theirs, slice):
                parts = ((ours.start, theirs.start), (ours.stop, theirs.stop), (ours.step, theirs.step))
                return slice(*(merged(one, two) for one, two in parts))
            if isinstance(ours, Node) or isinstance(theirs, Node):
                raise TraceError(f"node {node.name!r} reads {ours} in training and {theirs} in evaluation")
            if ours is theirs or ours == theirs:
                return ours
            count += 1
            with training.inserting_before(node):
                switch = training.call_module(_install(root, owner(node), ModeSwitch(ours, theirs)))
            switch.meta[OWNER] = owner(node)
            return switch

        node.args = merged(node.args, other.args)
        node.kwargs = merged(node.kwargs, other.kwargs)
    return count


def switches_of(root: nn.Module, path: str) -> list[str]:
    """Paths of the switches that belong to the module at `path`."""
    children = root.get_submodule(path)._modules.items()
    return [f"{path}.{name}".lstrip(".") for name, child in children if isinstance(child, ModeSwitch)]


def _install(root: nn.Module, path: str, switch: ModeSwitch) -> str:
    holder = root.get_submodule(path)
    switch.train(holder.training)
    index = sum(isinstance(child, ModeSwitch) for child in holder._modules.values())
    name = f"vmkd_mode_{index}"
    holder._modules[name] = switch
    return f"{path}.{name}" if path else name
