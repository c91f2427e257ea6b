"""Small edits that every pass needs: outputs, new submodules, replaced nodes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from vmkd_fx.errors import ModelError
from vmkd_fx.graph.nodes import OWNER
from vmkd_fx.graph.receipt import PREFIX, Receipt
from vmkd_fx.graph.traced import TracedModule

LOGITS = "logits"

_AUGMENTED = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imatmul", "setitem"}
_VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "swapaxes", "movedim", "squeeze"),
    *(
        "unsqueeze",
        "expand",
        "chunk",
        "split",
        "unbind",
        "detach",
        "contiguous",
        "getitem",
        "narrow",
        "select",
    ),
    *("view_as", "expand_as", "reshape_as", "t", "float", "double", "half", "to", "type_as", "getattr"),
}


def output_node(module: TracedModule) -> Node:
    """The graph's output node."""
    return next(node for node in reversed(module.graph.nodes) if node.op == "output")


def named_outputs(module: TracedModule) -> dict[str, Node]:
    """The outputs by name; a model that returns one bare tensor has one output, named "".

    Raises:
        ModelError: the model returns something else than a tensor or a flat dict of tensors.
    """
    value = output_node(module).args[0]
    if isinstance(value, Node):
        return {"": value}
    if isinstance(value, Mapping) and all(isinstance(item, Node) for item in value.values()):
        return {str(name): item for name, item in value.items() if isinstance(item, Node)}
    raise ModelError(
        f"{module.info.name} returns {type(value).__name__} of {value}; a student returns one tensor of "
        "logits (for timm models: create them without features_only and without distilled training outputs)"
    )


def logits_node(module: TracedModule) -> Node:
    """The node that holds the class logits."""
    outputs = named_outputs(module)
    return outputs[LOGITS] if LOGITS in outputs else outputs[""]


def set_outputs(module: TracedModule, outputs: Mapping[str, Node]) -> None:
    """Let the graph return `outputs`: the bare tensor for the single name "", else the flat dict."""
    value = outputs[""] if set(outputs) == {""} else dict(outputs)
    output_node(module).args = (value,)


class Injection:
    """Adds modules, nodes and outputs to a graph and writes the receipt while it does.

    Use it on a graph of one's own (`fork`), then call `finish`.
    """

    def __init__(self, module: TracedModule, name: str, config: dict[str, object]) -> None:
        self.module = module
        self.name = name
        self.config = config
        self.before = named_outputs(module)
        self.outputs = dict(self.before) if "" not in self.before else {LOGITS: self.before[""]}
        self.modules: list[str] = []
        self.nodes: list[str] = []

    def call(self, path: str, submodule: nn.Module, *args: Node, after: Node) -> Node:
        """Install `submodule` under the reserved prefix at `path` and call it right after the node
        `after`.
        """
        path = f"{PREFIX}.{self.name}.{path}"
        if any(path == name for name, _ in self.module.named_modules()):
            raise ModelError(f"{self.module.info.name} already holds a module at {path!r}")
        self.module.add_submodule(path, submodule)
        with self.module.graph.inserting_after(after):
            node = self.module.graph.call_module(path, args)
        self.modules.append(path)
        self.nodes.append(node.name)
        return node

    def keep(self, node: Node) -> Node:
        """A copy of what `node` holds, made before anything can write over it."""
        with self.module.graph.inserting_after(node):
            copy = self.module.graph.call_method("clone", (node,))
        self.nodes.append(copy.name)
        return copy

    def item(self, node: Node, index: int) -> Node:
        """One of the values that `node` holds."""
        with self.module.graph.inserting_after(node):
            found = self.module.graph.call_function(operator.getitem, (node, index))
        self.nodes.append(found.name)
        return found

    def emit(self, name: str, node: Node) -> None:
        """Let `node` leave through the graph's output as `<pass>/<name>`."""
        self.outputs[f"{self.name}/{name}"] = node

    def finish(self) -> TracedModule:
        """Set the outputs, keep the receipt and compile."""
        set_outputs(self.module, self.outputs)
        order = {node.name: index for index, node in enumerate(self.module.graph.nodes)}
        receipt = Receipt(
            self.name,
            self.config,
            tuple(self.modules),
            tuple(sorted(self.nodes, key=order.__getitem__)),
            {name: node.name for name, node in self.before.items()},
            {name: node.name for name, node in self.outputs.items()},
        )
        self.module.meta["receipts"] = (*self.module.receipts, receipt)
        self.module.graph.lint()
        self.module.recompile()
        return self.module


def computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what `kind` computes: its forward is that of `kind` whatever its class is
    called, its weights are plain parameters, and no hook changes what goes in or comes out.
    """
    methods = ("forward", "_conv_forward")
    same = all(getattr(type(module), name, None) is _method(module, kind, name) for name in methods)
    hooked = module._forward_hooks or module._forward_pre_hooks
    return isinstance(module, kind) and same and not hooked and not hasattr(module, "parametrizations")


def _method(module: nn.Module, kind: type[nn.Module], name: str) -> Any:
    """The method as torch.nn defines it for the nearest of its own classes that `module` is made of."""
    own = (c for c in type(module).__mro__ if issubclass(c, kind) and c.__module__.startswith("torch.nn"))
    return getattr(next(own, kind), name, None)


def changes_in_place(node: Node, module: nn.Module) -> bool:
    """Whether a node writes into one of its operands: `x.mul_(y)`, `x += y`, a ReLU with `inplace=True`."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    augmented = getattr(node.target, "__module__", "") == "_operator" and name in _AUGMENTED
    return augmented or bool(node.kwargs.get("inplace", False)) or node.kwargs.get("out") is not None


def written_to(node: Node, module: nn.Module) -> bool:
    """Whether some node writes into this node's value, directly or through a view of it."""
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            if changes_in_place(user, module):
                return True
            if user not in seen and _may_be_a_view(user, module):
                seen.add(user)
                todo.append(user)
    return False


def overwritten(node: Node, module: nn.Module) -> bool:
    """Whether some node writes into this node's value, or into what it is a view of."""
    base = node
    while _may_be_a_view(base, module) and base.all_input_nodes:
        base = base.all_input_nodes[0]
    return written_to(base, module)


def _may_be_a_view(node: Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        kinds = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
        return isinstance(module.get_submodule(str(node.target)), kinds)
    return is_view(node)


def is_view(node: Node) -> bool:
    """Whether the result of a function or method may share memory with its operand."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in _VIEWS


def drop_dead_nodes(module: TracedModule) -> None:
    """Remove what nobody reads, but not what writes into something that is read."""
    drop_dead(module.graph, module)


def drop_dead(graph: Graph, module: nn.Module) -> None:
    """`drop_dead_nodes` for a graph over `module` that is not compiled yet."""
    graph.eliminate_dead_code(
        lambda node: node.is_impure() or (node.op != "get_attr" and changes_in_place(node, module))
    )


def owner(node: Node) -> str:
    """Path of the module whose forward holds the node; "" for the root."""
    if OWNER in node.meta:
        return str(node.meta[OWNER])
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if node.op == "call_module" and stack:
        stack = stack[:-1]
    return str(stack[-1][0]) if stack else ""
