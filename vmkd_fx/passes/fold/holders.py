"""Operators that hold a weight and a bias which a channel affine can melt into, and where each has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.rewrite import Rewrite, argument

aten = torch.ops.aten

Axes = tuple[int, ...]

_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
}
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_KINDS: dict[Any, str] = {
    aten.linear.default: "linear",
    aten.layer_norm.default: "layer_norm",
    aten.rms_norm.default: "rms_norm",
    aten.group_norm.default: "group_norm",
    **dict.fromkeys(_CONVOLUTIONS, "conv"),
    **dict.fromkeys(_TRANSPOSED, "conv_transpose"),
}
MATRICES = ("linear", "conv", "conv_transpose")


@dataclass(frozen=True)
class Holder:
    """An operator with a weight that is a constant of the model.

    Attributes:
        node, kind: the operator; "linear", "conv", "conv_transpose", "layer_norm", "rms_norm" or
            "group_norm".
        weight, bias: the nodes that it reads; None where it has none.
        out_axes: the axes of its result along which its weight differs; the channels.
        in_axis: the axis of its input that it sums over; None for a norm.
    """

    node: Node
    kind: str
    weight: Node | None
    bias: Node | None
    out_axes: Axes
    in_axis: int | None

    @property
    def groups(self) -> int:
        return int(argument(self.node, "groups", 1)) if self.kind in ("conv", "conv_transpose") else 1

    def pads_with_zeros(self) -> bool:
        """Whether it reads, or leaves out, values beside its input that no affine before it has touched."""
        if self.kind == "conv_transpose":
            return True
        padding = argument(self.node, "padding", 0) if self.kind == "conv" else 0
        return any(padding) if isinstance(padding, (list, tuple)) else padding not in (0, "valid")


def holder_of(rewrite: Rewrite, node: Any) -> Holder | str:
    """What holds the weights at `node`; a reason where nothing does."""
    if not isinstance(node, Node) or node.op != "call_function" or node.target not in _KINDS:
        return f"{node} has no weight that could take it"
    kind = _KINDS[node.target]
    weight, bias = argument(node, "weight"), argument(node, "bias") if kind != "rms_norm" else None
    for held in (weight, bias):
        if held is not None and rewrite.constant(held) is None:
            return f"the weights of {node} are computed"
        if held is not None and rewrite.readers(held) > 1:
            return f"the weights of {node} are used {rewrite.readers(held)} times"
    if kind in MATRICES and weight is None:
        return f"{node} has no weight"
    rank = len(rewrite.shape(node))
    if kind in ("layer_norm", "rms_norm"):
        count = len(argument(node, "normalized_shape"))
        return Holder(node, kind, weight, bias, tuple(range(rank - count, rank)), None)
    axis = (
        rank - 1 if kind == "linear" else rank - (len(rewrite.shape(weight)) - 1) if kind in MATRICES else 1
    )
    return Holder(node, kind, weight, bias, (axis,), axis if kind in MATRICES else None)


def rewritten(
    rewrite: Rewrite, holder: Holder, source: Any, weight: torch.Tensor, bias: torch.Tensor | None
) -> Node:
    """The same operator on `source` with these parameters, as a new node."""
    names = [declared.name for declared in holder.node.target._schema.arguments]  # type: ignore[union-attr]
    args = list(holder.node.args)
    args[0] = source
    kwargs = dict(holder.node.kwargs)
    for name, tensor, old in (("weight", weight, holder.weight), ("bias", bias, holder.bias)):
        if tensor is None:
            continue
        made = rewrite.put(tensor, like=old if old is not None else _beside(holder, name))
        place = names.index(name)
        while len(args) < place:
            args.append(holder.node.target._schema.arguments[len(args)].default_value)  # type: ignore[union-attr]
        args[place : place + 1] = [made]
        kwargs.pop(name, None)
    return rewrite.call(holder.node.target, *args, **kwargs)


def _beside(holder: Holder, name: str) -> str | None:
    """A path for a parameter that the model has none of yet, beside the one that it has."""
    known = holder.weight if holder.weight is not None else holder.bias
    return None if known is None else f"{str(known.target).rpartition('.')[0]}.{name}".lstrip(".")
