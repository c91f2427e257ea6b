"""Specialise a graph to evaluation: everything that only training needs goes.

In eval mode a dropout, a stochastic depth and an identity hand their input on, a mode switch is a constant,
and an assertion about the image's size has no work left once the size is fixed. What remains is spelled in
ATen operators, nothing in place and nothing closed. Exact.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import PythonCode

from vmkd_fx.graph.normal_form import normal_form
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.rewrite import argument, is_call

aten = torch.ops.aten

_DROPOUTS = (aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)
_COPIES = (aten.contiguous, aten.clone, aten.detach, aten.detach_, aten.alias, aten.lift_fresh_copy)


def specialise_to_evaluation(module: TracedModule) -> tuple[TracedModule, int]:
    """The same function in eval mode, in ATen operators; and how many nodes handed their input on.

    Raises:
        TraceError: the model has no graph of ATen operators.
    """
    normal = normal_form(module.eval()).eval()
    idle = [node for node in normal.graph.nodes if _hands_input_on(node)]
    for node in idle:
        node.replace_all_uses_with(node.args[0])
        normal.graph.erase_node(node)
    for node in normal.graph.nodes:
        if is_call(node, aten.view, aten._unsafe_view):
            node.target = aten.reshape.default  # how its operand lies in memory is nobody's business any more
    return tidied(normal), len(idle)


def tidied(module: TracedModule) -> TracedModule:
    """The same graph without dead nodes, over only those parameters and buffers that it reads, compiled."""
    module.graph.eliminate_dead_code()
    used = _Used(module, module.graph)
    used.meta = module.meta
    return TracedModule(used, module.graph).eval()


class _Used(GraphModule):
    """What a graph reads, picked out; it is never called, and generating code is most of the work."""

    def recompile(self) -> PythonCode:
        return PythonCode("", {}, None)


def _hands_input_on(node: Node) -> bool:
    if is_call(node, *_DROPOUTS):
        return argument(node, "train") is False
    return is_call(node, *_COPIES)
