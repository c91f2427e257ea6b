"""How a stream is laid out: which axes hold locations, where its channels are, what norm starts a branch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from vmkd_fx.graph.joins import DataFlow
from vmkd_fx.graph.shapes import Shape
from vmkd_fx.graph.traced import TracedModule

LOCATION_AXES: dict[str, frozenset[int]] = {
    "NLC": frozenset({1}),
    "NCHW": frozenset({2, 3}),
    "NHWC": frozenset({1, 2}),
}
CHANNEL_AXIS = {"NLC": 2, "NCHW": 1, "NHWC": 3}

_NORM_FUNCTIONS = {F.layer_norm, F.group_norm, F.batch_norm, F.instance_norm, F.rms_norm}
_NORM_MODULES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_MOVES = {torch.permute, torch.transpose, "permute", "transpose"}
_CASTS = {"contiguous", "float", "to", "type_as"}


def layout_of(module: TracedModule, shapes: Mapping[Node, Shape], stream: Node, nodes: Iterable[Node]) -> str:
    """The layout of `stream`, from what the layers among `nodes` take for its channels.

    Three axes are NLC. Of four, a first layer that sees them unmoved says it by its kind: a convolution takes
    channels first, a Linear or LayerNorm last. Else the first layer says it that takes as many channels as
    one of the two axes has.
    """
    shape = shapes[stream]
    if len(shape) == 3:
        return "NLC"
    moved = False
    for node in nodes:
        moved = moved or moves_axes(node) or len(shapes.get(node, shape)) != 4
        channels = _channels_read(module, shapes, node)
        if channels is not None and not moved:
            return "NCHW" if _is_convolution(module, node) else "NHWC"
        if channels in (shape[1], shape[3]) and shape[1] != shape[3]:
            return "NCHW" if channels == shape[1] else "NHWC"
    return "NCHW"


def location_count(shape: Shape, layout: str) -> int:
    """How many locations a tensor of this layout has, prefix tokens included."""
    return prod(shape[axis] for axis in LOCATION_AXES[layout])


def leading_norm(module: TracedModule, stream: Node, nodes: tuple[Node, ...]) -> Node | None:
    """The norm, or the per-channel affine in its place, that alone reads the stream at the head of a branch.

    A channel-last norm of a channel-first stream counts with the permutations around it.
    """
    readers = [node for node in nodes if stream in node.all_input_nodes]
    if len(readers) != 1:
        return None
    node = readers[0]
    while (moves_axes(node) or node.target in _CASTS) and len(node.users) == 1:
        node = next(iter(node.users))
    if not _is_norm(module, node):
        return None
    while node is not readers[0] and len(node.users) == 1:
        follower = next(iter(node.users))
        if not moves_axes(follower) and follower.target not in _CASTS:
            break
        node = follower
    return node if node in nodes else None


def prefix_tokens(flow: DataFlow, stream: Node) -> int:
    """Class, distillation and register tokens in front of the patches of an NLC stream: what the latest
    concatenation along the tokens put before its longest part.
    """
    length = flow.shapes[stream][1]
    on_the_way = [node for node in flow.cuts(stream) if node in flow.token_joins]
    for node in (*reversed(on_the_way), *reversed(flow.token_joins)):
        if flow.shapes[node][1] == length and flow.order[node] < flow.order[stream]:
            parts = node.args[0] if node.args else node.kwargs["tensors"]
            assert isinstance(parts, (tuple, list))
            lengths = [flow.shapes[part][1] for part in parts if isinstance(part, Node)]
            return sum(lengths[: lengths.index(max(lengths))])
    return 0


def _channels_read(module: TracedModule, shapes: Mapping[Node, Shape], node: Node) -> int | None:
    """How many channels a layer asks for."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        for kind, name in (
            (nn.modules.conv._ConvNd, "in_channels"),
            (nn.Linear, "in_features"),
            (nn.GroupNorm, "num_channels"),
            (nn.modules.batchnorm._NormBase, "num_features"),
        ):
            if isinstance(layer, kind):
                return int(getattr(layer, name))
        return layer.normalized_shape[-1] if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) else None
    if node.target in (F.layer_norm, F.rms_norm):
        spanned = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
        return spanned[-1] if isinstance(spanned, (tuple, list)) and isinstance(spanned[-1], int) else None
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    if node.target is F.linear and isinstance(weight, Node) and weight in shapes:
        return shapes[weight][1]
    if node.target is F.conv2d and isinstance(weight, Node) and weight in shapes:
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        return shapes[weight][1] * groups if isinstance(groups, int) else None
    return None


def _is_convolution(module: TracedModule, node: Node) -> bool:
    if node.op != "call_module":
        return node.target is F.conv2d
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
    return isinstance(module.get_submodule(str(node.target)), kinds)


def moves_axes(node: Node) -> bool:
    """Whether an operation may give the axes another order."""
    return node.target in _MOVES and node.op in ("call_method", "call_function")


def _is_norm(module: TracedModule, node: Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _NORM_MODULES)
    if node.target in _NORM_FUNCTIONS:
        return True
    parameters = [source for source in node.all_input_nodes if source.op == "get_attr"]
    return getattr(node.target, "__name__", "") == "addcmul" and len(parameters) == 2
