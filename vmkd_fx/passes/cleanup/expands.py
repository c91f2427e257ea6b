"""Let operators repeat what they can repeat themselves.

    expand(x, shape of y) + y = x + y        the same for -, * and /, where y has the shape of the result

An expansion to the batch needs arithmetic on shapes in every runtime, and writes what is read only once.
Exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, is_call

aten = torch.ops.aten

_EXPANSIONS = (aten.expand, aten.expand_as)
_BROADCASTING = (aten.add, aten.sub, aten.mul, aten.div, aten.minimum, aten.maximum)


def drop_expansions(rewrite: Rewrite) -> None:
    """Read what is expanded where the other operand has the whole shape."""
    for node in rewrite.calls(*_BROADCASTING):
        one, other = node.args[:2]
        for given, beside in ((one, other), (other, one)):
            if (
                is_call(given, *_EXPANSIONS)
                and _is_whole(rewrite, beside, node)
                and rewrite.take(node, "without expansion")
            ):
                node.replace_input_with(given, given.args[0])  # type: ignore[arg-type, union-attr]
                break


EXPANDS = LoweringPass("expands", drop_expansions)


def _is_whole(rewrite: Rewrite, value: Any, node: Node) -> bool:
    """Whether `value` alone gives the result its shape, for every batch."""
    if not isinstance(value, Node) or is_call(value, *_EXPANSIONS):
        return False
    return all(
        one.shape == other.shape for one, other in zip(rewrite.held(value), rewrite.held(node), strict=True)
    )
