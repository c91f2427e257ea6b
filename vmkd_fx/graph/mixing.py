"""Does a piece of graph mix tokens? Answered from what its operations do with the axes that hold the
locations.

A branch mixes tokens when changing one location of its input changes another of its output. The axes that
carry locations are followed through the graph; an operation that sums, normalises or convolves over one of
them mixes.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from vmkd_fx.graph.shapes import Shape
from vmkd_fx.graph.traced import TracedModule

Axes = frozenset[int]


@dataclass(frozen=True)
class Mixing:
    """The verdict on a branch: whether it mixes tokens (None: an operation was not understood) and by
    what.
    """

    mixes: bool | None
    by: str = ""


class _Verdict(Exception):  # noqa: N818 (control flow, not a failure)
    def __init__(self, mixes: bool | None, by: str) -> None:
        self.mixing = Mixing(mixes, by)


_ELEMENTWISE = {
    *(
        operator.add,
        operator.iadd,
        operator.sub,
        operator.mul,
        operator.imul,
        operator.truediv,
        operator.neg,
        operator.pow,
    ),
    *(
        torch.add,
        torch.sub,
        torch.mul,
        torch.div,
        torch.addcmul,
        torch.exp,
        torch.sigmoid,
        torch.tanh,
        torch.relu,
    ),
    *(torch.rsqrt, torch.sqrt, torch.abs, torch.clamp, torch.where, torch.square),
    *(
        F.gelu,
        F.relu,
        F.silu,
        F.sigmoid,
        F.tanh,
        F.dropout,
        F.hardswish,
        F.hardsigmoid,
        F.softplus,
        F.elu,
        F.mish,
    ),
    *(F.leaky_relu, F.relu6, F.hardtanh),
    *(
        "add",
        "add_",
        "sub",
        "sub_",
        "mul",
        "mul_",
        "div",
        "div_",
        "neg",
        "pow",
        "exp",
        "sigmoid",
        "tanh",
        "relu",
        "relu_",
    ),
    *(
        "clone",
        "contiguous",
        "float",
        "half",
        "double",
        "to",
        "type_as",
        "detach",
        "rsqrt",
        "sqrt",
        "square",
        "clamp",
    ),
    *("gelu", "silu", "abs", "addcmul"),
}
_MATMUL = {operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"}
_REDUCE = {
    torch.mean,
    torch.sum,
    torch.amax,
    torch.max,
    torch.var,
    torch.std,
    "mean",
    "sum",
    "amax",
    "max",
    "var",
    "std",
}
_CONV = {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d}
_RESHAPE = {torch.reshape, torch.flatten, "reshape", "view", "flatten", "unflatten"}
_POINTWISE_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm),
    *(nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid),
    *(nn.ELU, nn.LeakyReLU, nn.Mish, nn.Softplus, nn.PReLU, nn.Hardtanh),
)


def mixes_tokens(
    module: TracedModule, shapes: Mapping[Node, Shape], nodes: Iterable[Node], entry: Node, axes: Axes
) -> Mixing:
    """Whether the branch `nodes`, which reads `entry` with locations on `axes`, mixes tokens."""
    carried: dict[Node, Axes] = {entry: axes}
    modules = dict(module.named_modules())
    try:
        for node in nodes:
            sources = [source for source in node.all_input_nodes if source in carried]
            if sources and node in shapes:
                carried[node] = _follow(node, modules, shapes, carried)
            elif sources and _is_tuple_of_tensors(node):
                carried[node] = carried[sources[0]]
    except _Verdict as verdict:
        return verdict.mixing
    return Mixing(False)


def _follow(
    node: Node, modules: Mapping[str, nn.Module], shapes: Mapping[Node, Shape], carried: Mapping[Node, Axes]
) -> Axes:
    """The location axes of the node's value, or a verdict."""
    source = next(n for n in node.all_input_nodes if n in carried)
    axes, rank = carried[source], len(shapes[node])
    if node.op == "call_module":
        return _through_module(modules[str(node.target)], str(node.target), axes, shapes[source])
    target: Any = node.target
    args: tuple[Any, ...] = node.args
    if target in _ELEMENTWISE or getattr(target, "__name__", "") in ("drop_path",):
        joined: set[int] = set()
        for operand in node.all_input_nodes:
            if operand in carried and operand in shapes:
                joined |= {axis + rank - len(shapes[operand]) for axis in carried[operand]}
        return frozenset(joined)
    if target in (torch.transpose, "transpose", "swapaxes"):
        one, two = (int(axis) % rank for axis in args[1:3])
        return frozenset({one: two, two: one}.get(axis, axis) for axis in axes)
    if target in (torch.permute, "permute"):
        order = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
        return frozenset(new for new, old in enumerate(order) if int(old) % rank in axes)
    if target in _RESHAPE:
        return reshaped_axes(shapes[source], shapes[node], axes)
    return _through_function(node, target, axes, shapes, carried)


def _through_function(
    node: Node, target: Any, axes: Axes, shapes: Mapping[Node, Shape], carried: Mapping[Node, Axes]
) -> Axes:
    source = next(n for n in node.all_input_nodes if n in carried)
    args: tuple[Any, ...] = node.args
    rank = len(shapes[source]) if source in shapes else len(shapes[node])
    last = rank - 1
    if target is F.linear:
        _mixed_if(last in axes, "linear over tokens")
        return axes
    if target in (F.layer_norm, getattr(F, "rms_norm", F.layer_norm)):
        _mixed_if(any(axis >= rank - len(args[1]) for axis in axes), "norm over tokens")
        return axes
    if target in (F.group_norm, F.instance_norm):
        _mixed_if(any(axis > 1 for axis in axes), "norm over tokens")
        return axes
    if target is F.batch_norm:
        return axes
    if target is F.scaled_dot_product_attention:
        _mixed_if(last - 1 in axes, "attention")
        return axes
    if target in _MATMUL:
        return _through_matmul(node, shapes, carried)
    if target in (F.softmax, torch.softmax, "softmax"):
        dim: Any = node.kwargs.get("dim", args[1] if len(args) > 1 else -1)
        _mixed_if(int(dim) % rank in axes, "softmax over tokens")
        return axes
    if target in _REDUCE:
        return _through_reduction(node, axes, rank, len(shapes[node]))
    if target in (F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d):
        raise _Verdict(True, "pooling")
    if target in _CONV:
        weight = shapes.get(args[1], ())
        return _through_convolution(tuple(weight[2:]), axes)
    if target in (torch.chunk, torch.split, "chunk", "split", torch.unbind, "unbind", operator.getitem):
        return _through_selection(node, target, axes, shapes, source)
    if target in (torch.unsqueeze, "unsqueeze"):
        at = int(args[1]) % (rank + 1)
        return frozenset(axis + (axis >= at) for axis in axes)
    if target in (torch.roll, "roll"):
        raise _Verdict(True, "shift")
    raise _Verdict(None, f"{getattr(target, '__name__', target)} is not understood")


def _through_module(module: nn.Module, path: str, axes: Axes, shape: Shape) -> Axes:
    if isinstance(module, nn.Linear):
        _mixed_if(len(shape) - 1 in axes, "linear over tokens")
    elif isinstance(module, nn.modules.conv._ConvNd):
        return _through_convolution(tuple(module.kernel_size), axes)
    elif isinstance(module, nn.LayerNorm) or type(module).__name__ == "RMSNorm":
        spanned = len(module.normalized_shape)  # type: ignore[arg-type]
        _mixed_if(any(axis >= len(shape) - spanned for axis in axes), "norm over tokens")
    elif isinstance(module, (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)):
        _mixed_if(any(axis > 1 for axis in axes), "norm over tokens")
    elif isinstance(module, (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd)):
        raise _Verdict(True, "pooling")
    elif isinstance(module, nn.MultiheadAttention):
        raise _Verdict(True, "attention")
    elif not isinstance(module, _POINTWISE_MODULES) and not _hands_input_on(module, len(shape)):
        raise _Verdict(None, f"{path} ({type(module).__name__}) is closed")
    return axes


def _hands_input_on(module: nn.Module, rank: int) -> bool:
    """Whether a closed module, a stochastic depth say, is the identity in eval mode."""
    x = torch.arange(2.0**rank).reshape([2] * rank)
    try:
        return torch.equal(copy.deepcopy(module).eval()(x), x)
    except Exception:
        return False


def _through_convolution(kernel: Shape, axes: Axes) -> Axes:
    _mixed_if(1 in axes, "convolution over tokens as channels")
    wide = any(axis >= 2 and kernel[axis - 2] > 1 for axis in axes)
    _mixed_if(wide, f"{'x'.join(map(str, kernel))} convolution")
    return axes


def _through_matmul(node: Node, shapes: Mapping[Node, Shape], carried: Mapping[Node, Axes]) -> Axes:
    left, right = node.args[0], node.args[1]
    joined: set[int] = set()
    for operand, contracted in ((left, -1), (right, -2)):
        if isinstance(operand, Node) and operand in carried:
            rank = len(shapes[operand])
            _mixed_if(rank + contracted in carried[operand], "matrix product over tokens")
            joined |= {axis + len(shapes[node]) - rank for axis in carried[operand]}
    return frozenset(joined)


def _through_reduction(node: Node, axes: Axes, rank: int, new_rank: int) -> Axes:
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else tuple(range(rank)))
    gone = {int(axis) % rank for axis in (dim if isinstance(dim, (tuple, list)) else (dim,))}
    _mixed_if(bool(gone & axes), "pooling")
    if new_rank == rank:
        return axes
    return frozenset(axis - sum(other < axis for other in gone) for axis in axes)


def _through_selection(
    node: Node, target: Any, axes: Axes, shapes: Mapping[Node, Shape], source: Node
) -> Axes:
    """Chunks keep the axes; an integer index or unbind removes one in front of those behind it."""
    if target is not operator.getitem:
        return axes
    before = shapes.get(source) or shapes.get(source.all_input_nodes[0], ())
    lost = len(before) - len(shapes[node])
    index = node.args[1]
    if isinstance(index, tuple) and any(isinstance(part, (slice, int)) for part in index):
        cut = {at for at, part in enumerate(index) if part != slice(None) and part is not Ellipsis}
        _mixed_if(bool(cut & axes), "selection of tokens")
    return frozenset(axis - lost for axis in axes)


def reshaped_axes(before: Shape, after: Shape, axes: Axes) -> Axes:
    """Which axes of `after` hold what `axes` of `before` held, by cutting both shapes into groups of equal
    size.
    """
    old, new, found = 0, 0, set()
    while old < len(before) and new < len(after):
        old_end, new_end = old + 1, new + 1
        while prod(before[old:old_end]) != prod(after[new:new_end]):
            if prod(before[old:old_end]) < prod(after[new:new_end]):
                old_end += 1
            else:
                new_end += 1
        if any(old <= axis < old_end for axis in axes):
            found |= _within_group(before[old:old_end], after[new:new_end], {a - old for a in axes}, new)
        old, new = old_end, new_end
    return frozenset(found)


def _within_group(before: Shape, after: Shape, axes: set[int], offset: int) -> set[int]:
    """Inside one group, an axis that is not the only one touched spreads over the group's matching part."""
    at = min(axis for axis in axes if axis >= 0)
    lead = prod(before[:at])
    size = prod(before[axis] for axis in axes if 0 <= axis < len(before))
    found, passed = set(), 1
    for index, edge in enumerate(after):
        if edge > 1 and passed >= lead and passed * edge <= lead * size:
            found.add(offset + index)
        passed *= edge
    return found or {offset + index for index in range(len(after))}


def _mixed_if(condition: bool, by: str) -> None:
    if condition:
        raise _Verdict(True, by)


def _is_tuple_of_tensors(node: Node) -> bool:
    return node.target in (torch.chunk, torch.split, "chunk", "split", torch.unbind, "unbind")
