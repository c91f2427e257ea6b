"""Write a plan into its graph: casts where precisions meet, weights in the precision of who reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Node

from vmkd_fx.deploy.precision.plan import Plan
from vmkd_fx.deploy.precision.rules import ARITHMETIC, operator_name, rule_of
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import attribute

_BOUNDED = ("clamp", "clamp_min", "clamp_max", "hardtanh")
"""What else ONNX gives its numbers as tensors."""

_COPY = torch.ops.aten._to_copy.default


class Casts:
    """Edits one graph, whose tensors are its own to replace.

    Args:
        floating: the nodes that hold real numbers.

    Attributes:
        made: how many casts were written.
    """

    def __init__(self, module: TracedModule, plan: Plan, dtype: torch.dtype, floating: set[Node]) -> None:
        self.made = 0
        self._module = module
        self._plan = plan
        self._dtype = dtype
        self._floating = floating
        self._given: dict[tuple[Node, torch.dtype], Node] = {}
        self._wanted: dict[str, set[torch.dtype]] = {}

    def write(self) -> None:
        """Give each reader its operands in its own precision; the output is float32."""
        for node in self._plan.half:
            if rule_of(node).kind == ARITHMETIC or operator_name(node) in _BOUNDED:
                node.args = tuple(map(self._rounded, node.args))
                node.kwargs = {name: self._rounded(given) for name, given in node.kwargs.items()}
        edges = [
            (source, node, self._dtype if node in self._plan.half else torch.float32)
            for node in self._module.graph.nodes
            if node.op in ("call_function", "output")
            for source in node.all_input_nodes
            if source in self._floating
        ]
        for source, _, wanted in edges:
            if source.op == "get_attr":
                self._wanted.setdefault(str(source.target), set()).add(wanted)
        for source, reader, wanted in edges:
            given = self._in(source, wanted)
            if given is not source:
                reader.replace_input_with(source, given)

    def _rounded(self, given: Any) -> Any:
        """A number as an ONNX graph holds it, beside operands in half; torch would compute with all of it."""
        return torch.tensor(given).to(self._dtype).item() if isinstance(given, float) else given

    def _in(self, source: Node, wanted: torch.dtype) -> Node:
        """`source` in this precision; made once for all who want it, right behind it."""
        if source.op != "get_attr" and wanted == (
            self._dtype if source in self._plan.half else torch.float32
        ):
            return source
        if (source, wanted) not in self._given:
            constant = source.op == "get_attr"
            self._given[source, wanted] = (self._weight if constant else self._cast)(source, wanted)
        return self._given[source, wanted]

    def _cast(self, source: Node, wanted: torch.dtype) -> Node:
        self.made += 1
        with self._module.graph.inserting_after(source):
            return self._module.graph.call_function(_COPY, (source,), {"dtype": wanted})

    def _weight(self, source: Node, wanted: torch.dtype) -> Node:
        """A tensor of the model; it stays under its path unless readers of both precisions want it."""
        path = str(source.target)
        if wanted == torch.float32:
            return source
        if self._wanted[path] == {wanted}:
            _put(self._module, path, wanted)
            return source
        beside = f"{path}_{str(wanted).removeprefix('torch.')}"
        _put(self._module, path, wanted, beside)
        with self._module.graph.inserting_after(source):
            return self._module.graph.get_attr(beside)


def _put(module: TracedModule, path: str, dtype: torch.dtype, new: str | None = None) -> None:
    """Store the tensor at `path` in `dtype`, there or at `new`."""
    tensor = attribute(module, path)
    holder, _, name = (new or path).rpartition(".")
    parent = module.get_submodule(holder)
    if tensor.dtype == dtype:
        return
    for held in (parent._parameters, parent._buffers):
        held.pop(name, None)
    parent.register_parameter(name, nn.Parameter(tensor.detach().to(dtype), requires_grad=False))
