"""What stands between a branch's work and the sum: layer scale, drop path and dropout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Node

from vmkd_fx.graph.values import evaluating

_PRODUCTS = ("mul", "mul_", "multiply", "imul")


def split_trailing(module: nn.Module, body: Sequence[Node]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """A branch's nodes up to the end of its work, and what follows and only scales or drops it."""
    end, inside = len(body), set(body)
    while end and (_hands_on(module, body[end - 1]) or _scales(body[end - 1], inside)):
        end -= 1
    return tuple(body[:end]), tuple(body[end:])


def _hands_on(module: nn.Module, node: Node) -> bool:
    """Whether a module returns its input in evaluation, tried on numbers: Identity, dropout, drop path."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    called = module.get_submodule(str(node.target))
    if any(True for _ in called.parameters()) or any(True for _ in called.buffers()):
        return False
    numbers = torch.arange(36.0).reshape(1, 2, 3, 6) - 18
    try:
        with evaluating(called), torch.no_grad():
            return torch.equal(called(numbers), numbers)
    except Exception:  # it takes tensors of another kind, so it is no such layer
        return False


def _scales(node: Node, body: set[Node]) -> bool:
    """Whether a node multiplies what the branch computed by a parameter."""
    name = getattr(node.target, "__name__", str(node.target))
    factors = [source for source in node.all_input_nodes if source not in body]
    computed = len(node.all_input_nodes) - len(factors)
    return name in _PRODUCTS and computed == 1 and len(factors) == 1 and _is_parameter(factors[0])


def _is_parameter(node: Node) -> bool:
    """Whether a node reads a parameter, or is a view of one."""
    while node.op == "call_method" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"
