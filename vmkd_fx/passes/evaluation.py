"""Specialise a graph to evaluation: everything that only training needs goes.

In eval mode a dropout, a stochastic depth and an identity hand their input on, a mode switch is a constant,
and an assertion about the image's size has no work left once the size is fixed. The graph is traced again
with every module open that can be, so a closed DropPath, whatever its class is called, dissolves by what it
computes. Exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from vmkd_fx.errors import TraceError
from vmkd_fx.graph.edit import computes_as, drop_dead_nodes
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.tracer import GraphTracer
from vmkd_fx.passes.record import Record

_NO_OPS = (nn.Identity, nn.modules.dropout._DropoutNd)
_DROPOUTS = {F.dropout, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}


def specialise_to_evaluation(module: TracedModule) -> tuple[TracedModule, Record]:
    """The same function in eval mode with fewer nodes."""
    module.eval()
    before = len(module.graph.nodes)
    traced = _retrace(module)
    removed = 0
    for node in list(traced.graph.nodes):
        if node.target is torch._assert:
            traced.graph.erase_node(node)
            removed += 1
        elif _hands_input_on(traced, node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)
            removed += 1
    drop_dead_nodes(traced)
    traced = drop_unused(traced)
    gone = before - len(traced.graph.nodes)
    return traced, Record(removed, f"{removed} dropouts, identities and assertions, {gone} nodes fewer")


def drop_unused(module: TracedModule) -> TracedModule:
    """The same graph over only those modules, parameters and buffers that it reads."""
    used = GraphModule(module, module.graph)
    used.meta = module.meta
    return TracedModule(used, module.graph)


def _retrace(module: TracedModule) -> TracedModule:
    closed: set[str] = set()
    while True:
        tracer = GraphTracer(closed, module.info.input_size)
        try:
            return TracedModule(module, tracer.trace(module))
        except Exception as error:
            if not tracer.failed_in or tracer.failed_in in closed:
                raise TraceError(
                    f"{module.info.name} cannot be specialised to evaluation: {error}"
                ) from error
            closed.add(tracer.failed_in)


def _hands_input_on(module: TracedModule, node: Node) -> bool:
    if node.op == "call_module":
        return any(computes_as(module.get_submodule(str(node.target)), kind) for kind in _NO_OPS)
    return node.target in _DROPOUTS and node.kwargs.get("training", (*node.args, True, True)[2]) is False
