"""Average before a permutation instead of behind it, and write a pooling to one place as an average.

    mean(permute(x), axes) = mean(x, the same axes where they come from)
    adaptive_avg_pool(x, 1 x 1) = mean(x, height and width)

What is averaged away need not be moved first, and an exporter need not ask how it lies in memory: of a
pooling of channels-last maps it makes a gather by computed places. Exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.fold.moves import PERMUTES, permutation
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument, is_call

aten = torch.ops.aten


def average_first(rewrite: Rewrite) -> None:
    """Rewrite averages of what a permutation makes for them alone; poolings where the target is no torch."""
    for node in rewrite.calls(aten.mean.dim, aten.adaptive_avg_pool2d):
        permute: Any = node.args[0]
        axes = _axes(rewrite, node)
        if not axes:
            continue
        if not is_call(permute, *PERMUTES) or len(permute.users) > 1:
            pooling = not is_call(node, aten.mean) and rewrite.target.kind != "torch"
            if pooling and rewrite.take(node, "poolings to one place as averages"):
                rewrite.replace(node, rewrite.call(aten.mean.dim, permute, axes, True))
            continue
        if argument(node, "dtype") is not None:
            rewrite.refuse(node, "it casts as well")
            continue
        order = permutation(permute, len(rewrite.shape(permute)))
        left = [place for axis, place in enumerate(order) if axis not in axes]
        if left != sorted(left):
            rewrite.refuse(node, "what is left over is in another order")
        elif rewrite.take(node, "averages before permutations"):
            _write(rewrite, node, permute.args[0], sorted(order[axis] for axis in axes))


MEANS = LoweringPass("means", average_first)


def _axes(rewrite: Rewrite, node: Node) -> list[int]:
    """What is averaged over completely; nothing where that is not so."""
    rank = len(rewrite.shape(node.args[0]))  # type: ignore[arg-type]
    if is_call(node, aten.mean):
        return [axis % rank for axis in argument(node, "dim") or ()]
    return [rank - 2, rank - 1] if rewrite.shape(node)[-2:] == (1, 1) else []


def _write(rewrite: Rewrite, node: Node, source: Node, axes: list[int]) -> None:
    value = rewrite.call(aten.mean.dim, source, axes)
    if len(rewrite.shape(node)) == len(rewrite.shape(source)):
        batch = rewrite.batched(node)
        shape = [-1 if axis == batch else edge for axis, edge in enumerate(rewrite.shape(node))]
        value = rewrite.call(aten.reshape.default, value, shape)
    rewrite.replace(node, value)
