"""Read a node of the graph as a linear map, and write a linear map as a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.fold.holders import Holder, holder_of
from vmkd_fx.passes.fold.linear_map import Edges, Form, LinearMap, average
from vmkd_fx.passes.rewrite import Rewrite, argument, is_call

aten = torch.ops.aten

_POOLS = (aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)
_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)
_WRITTEN = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@dataclass(frozen=True)
class MapNode:
    """A node that applies a linear map to `source`.

    Attributes:
        node, source: the map's result and its input.
        form: its shape.
        channel_axis: of the result and of the input.
        holder: where its weights are; None for an average, which has none.
    """

    node: Node
    source: Node
    form: Form
    channel_axis: int
    holder: Holder | None

    @property
    def weights(self) -> int:
        """How many numbers the model holds for its kernel."""
        return 0 if self.holder is None else self.form.weights

    @property
    def has_bias(self) -> bool:
        return self.holder is not None and self.holder.bias is not None

    def read(self, rewrite: Rewrite) -> LinearMap:
        """The map with its numbers."""
        if self.holder is None:
            return average(self.form)
        weight, bias = rewrite.constant(self.holder.weight), rewrite.constant(self.holder.bias)
        assert weight is not None
        return LinearMap(self.form, weight, bias)


def looks_like_a_map(node: Any) -> bool:
    """Whether it is an operator that may be a linear map with weights."""
    return is_call(node, aten.linear, *_CONVOLUTIONS)


def map_of(rewrite: Rewrite, node: Any) -> MapNode | str:
    """The linear map that `node` applies; a reason where it is none, or one that cannot be changed."""
    if is_call(node, *_POOLS):
        return _pool(rewrite, node)
    if not looks_like_a_map(node):
        return f"{node} is no linear map"
    holder = holder_of(rewrite, node)
    if isinstance(holder, str):
        return holder
    source = node.args[0]
    rank = len(rewrite.shape(node))
    weight = rewrite.shape(holder.weight)  # type: ignore[arg-type]
    if holder.kind == "linear":
        if len(weight) != 2:
            return f"the weight of {node} is no matrix"
        return MapNode(node, source, Form(weight[0], weight[1]), rank - 1, holder)
    kernel = weight[2:]
    groups = holder.groups
    if rank != len(weight):
        return f"{node} has no batch axis"
    stride, dilation = (_edges(argument(node, name), len(kernel)) for name in ("stride", "dilation"))
    padding = _padding(argument(node, "padding"), kernel, dilation)
    if padding is None:
        return f"{node} pads more on one side"
    form = Form(weight[0], weight[1] * groups, kernel, stride, padding, dilation, groups)
    return MapNode(node, source, form, 1, holder)


def write_map(rewrite: Rewrite, made: LinearMap, source: Node, like: MapNode) -> Node:
    """A new node that applies `made` to `source`; its parameters take the paths of those of `like`."""
    assert like.holder is not None and like.holder.weight is not None
    old = like.holder.weight
    weight = rewrite.put(made.weight, like=old)
    bias = None
    if made.bias is not None:
        beside = f"{str(old.target).rpartition('.')[0]}.bias".lstrip(".")
        bias = rewrite.put(made.bias, like=like.holder.bias if like.holder.bias is not None else beside)
    form = made.form
    if not form.kernel:
        return rewrite.call(aten.linear.default, source, weight, bias)
    edges = (list(form.stride), list(form.padding), list(form.dilation))
    return rewrite.call(_WRITTEN[len(form.kernel)], source, weight, bias, *edges, form.groups)


def _pool(rewrite: Rewrite, node: Node) -> MapNode | str:
    kernel = argument(node, "kernel_size")
    rank = len(rewrite.shape(node))
    axes = next(count for count, pool in enumerate(_POOLS, 1) if is_call(node, pool))
    if rank != axes + 2:
        return f"{node} has no batch axis"
    kernel, padding = _edges(kernel, axes), _edges(argument(node, "padding"), axes)
    stride = _edges(argument(node, "stride") or kernel, axes)
    if argument(node, "ceil_mode"):
        return f"{node} may average over fewer places at the border"
    if any(padding) and not argument(node, "count_include_pad"):
        return f"{node} averages over fewer places at the border"
    if not is_call(node, aten.avg_pool1d) and argument(node, "divisor_override"):
        return f"{node} divides by a number of its own"
    channels = rewrite.shape(node)[1]
    form = Form(channels, channels, kernel, stride, padding, (1,) * axes, channels)
    return MapNode(node, node.args[0], form, 1, None)  # type: ignore[arg-type]


def _padding(given: Any, kernel: Edges, dilation: Edges) -> Edges | None:
    if given == "valid":
        return (0,) * len(kernel)
    if given == "same":
        both = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return None if any(edge % 2 for edge in both) else tuple(edge // 2 for edge in both)
    return _edges(given, len(kernel))


def _edges(given: Any, axes: int) -> Edges:
    values = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    return values * axes if len(values) == 1 else values
