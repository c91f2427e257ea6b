"""Bounds that are tensors of the model as numbers; what cannot bind goes.

    clamp(x, -inf, b) = min(x, b)        clamp(x, a, b) = min(max(x, a), b)        clamp(x, -inf, inf) = x

Exact. torch's exporter gives the bounds of two clamps of one tensor one name, and the graph is not valid; and
a layer that was never calibrated (Gemma's clipped linears) is clamped to infinity.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument

aten = torch.ops.aten


def number_bounds(rewrite: Rewrite) -> None:
    """Write every clamp of real numbers with numbers for bounds, or else as a maximum and a minimum."""
    for node in rewrite.calls(aten.clamp):
        source: Any = node.args[0]
        given = [argument(node, "min"), argument(node, "max")]
        if not rewrite.held(node)[0].dtype.is_floating_point:
            continue
        bounds = [_bound(rewrite, bound) for bound in given]
        low, high = (None if bound in (-inf, inf) else bound for bound in bounds)
        if (low is None and bounds[0] == inf) or (high is None and bounds[1] == -inf):
            continue  # everything would be infinite
        written = [low, high] == given and not any(isinstance(bound, Node) for bound in given)
        if written or not rewrite.take(node, "clamps with numbers"):
            continue
        rewrite.replace(node, _clamped(rewrite, source, low, high))


CLAMPS = LoweringPass("clamps", number_bounds)


def _bound(rewrite: Rewrite, bound: Any) -> Any:
    """A constant of one element as a number; else as it is."""
    constant = rewrite.constant(bound) if isinstance(bound, Node) else None
    return float(constant) if constant is not None and constant.numel() == 1 else bound


def _clamped(rewrite: Rewrite, source: Node, low: Any, high: Any) -> Node:
    if not any(isinstance(bound, Node) for bound in (low, high)):
        if low is None and high is None:
            return source
        return rewrite.call(aten.clamp.default, source, low, high)
    value = source
    for operator, tensor_operator, bound in (
        (aten.clamp_min.default, aten.maximum.default, low),
        (aten.clamp_max.default, aten.minimum.default, high),
    ):
        if bound is not None:
            value = rewrite.call(tensor_operator if isinstance(bound, Node) else operator, value, bound)
    return value
