"""Read a piece of graph as a channel affine: y = s * x + t with one s and one t for each channel.

A norm's own weight, BatchNorm in evaluation, LayerScale, ResMLP's Affine, a product with a constant and
RIFormer's `affine(n) - n` (Eq. 4) are all this. The recogniser goes by operations, not by classes, and
composes:

    s1 * (s2 * x + t2) + t1 = (s1 s2) x + (s1 t2 + t1)          (s1 x + t1) - (s2 x + t2) = (s1 - s2) x + (t1
    - t2)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from vmkd_fx.graph.edit import computes_as, written_to
from vmkd_fx.graph.shapes import Shape
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import attribute


@dataclass(frozen=True)
class ChannelAffine:
    """`scale * base + shift` along one axis.

    Attributes:
        base: the node that is scaled.
        scale, shift: vectors over the channels, or scalars that hold for all.
        axis: the channel axis, None while only scalars were seen.
        members: the nodes that the expression consists of, without `base`.
    """

    base: Node
    scale: torch.Tensor
    shift: torch.Tensor
    axis: int | None
    members: frozenset[Node]


@dataclass(frozen=True)
class _Constant:
    value: torch.Tensor
    axis: int | None


_MULTIPLY = {operator.mul, torch.mul, "mul"}
_ADD = {operator.add, torch.add, "add"}
_SUBTRACT = {operator.sub, torch.sub, "sub"}
_VIEWS = ("view", "reshape", "unsqueeze", "flatten")
_DIVIDE = {operator.truediv, torch.div, torch.true_divide, "div"}


def may_be_affine(module: TracedModule, node: Node) -> bool:
    """Whether a node could be part of an affine, seen without shapes."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.modules.batchnorm._BatchNorm)
    if node.target is F.batch_norm:
        return True
    arithmetic = _MULTIPLY | _ADD | _SUBTRACT | _DIVIDE | {torch.addcmul}
    return node.target in arithmetic and any(
        not isinstance(argument, Node) or _behind_views(argument).op == "get_attr" for argument in node.args
    )


def _behind_views(node: Node) -> Node:
    while node.op == "call_method" and node.target in _VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


class AffineReader:
    """Reads the nodes of one graph; the graph must be specialised to evaluation."""

    def __init__(self, module: TracedModule, shapes: Mapping[Node, Shape]) -> None:
        self.module = module
        self.shapes = shapes
        self._readings: dict[Node, ChannelAffine] = {}
        attributes = (node for node in module.graph.nodes if node.op == "get_attr")
        self._changing = {str(node.target) for node in attributes if written_to(node, module)}
        for node in module.graph.nodes:  # in graph order each reading finds those that it builds on
            self._readings[node] = self._reading(node)

    def read(self, node: Node) -> ChannelAffine | None:
        """The largest channel affine that ends in `node`; None if the node is none."""
        found = self._readings[node]
        return None if found.base is node else found

    def _reading(self, node: Node) -> ChannelAffine:
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        itself = ChannelAffine(node, one, zero, None, frozenset())
        if node not in self.shapes:
            return itself
        found = self._batch_norm(node) or self._arithmetic(node)
        if found is None or self.shapes.get(found.base) != self.shapes[node]:
            return itself
        return replace(found, members=found.members | {node})

    def _arithmetic(self, node: Node) -> ChannelAffine | None:
        target: Any = node.target
        if target is torch.addcmul and not node.kwargs and len(node.args) == 3:
            shift, *factors = node.args
            product = self._product(factors[0], factors[1], node)
            return self._sum(product, self._constant(shift, node), 1)
        if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
            return None
        left, right = node.args
        if target in _MULTIPLY:
            return self._product(left, right, node)
        if (
            target in _DIVIDE
            and (divisor := self._constant(right, node)) is not None
            and isinstance(left, Node)
        ):
            return self._scaled(left, _Constant(1 / divisor.value, divisor.axis))
        if target in _ADD | _SUBTRACT:
            return self._addition(left, right, 1 if target in _ADD else -1, node)
        return None

    def _addition(self, left: Any, right: Any, sign: int, node: Node) -> ChannelAffine | None:
        constant = self._constant(right, node)
        if constant is not None and isinstance(left, Node):
            return self._sum(self._readings[left], constant, sign)
        constant = self._constant(left, node)
        if constant is not None and isinstance(right, Node):
            scaled = self._scaled(right, _Constant(torch.tensor(float(sign), dtype=torch.float64), None))
            return self._sum(scaled, constant, 1)
        if not isinstance(left, Node) or not isinstance(right, Node):
            return None
        return _combined(self._readings[left], self._readings[right], sign)

    def _product(self, left: Any, right: Any, node: Node) -> ChannelAffine | None:
        for factor, other in ((left, right), (right, left)):
            constant = self._constant(factor, node)
            if constant is not None and isinstance(other, Node):
                return self._scaled(other, constant)
        return None

    def _scaled(self, node: Node, factor: _Constant) -> ChannelAffine | None:
        inner = self._readings[node]
        if not _axes_agree(inner.axis, factor.axis):
            return None
        axis = inner.axis if factor.axis is None else factor.axis
        return replace(inner, scale=inner.scale * factor.value, shift=inner.shift * factor.value, axis=axis)

    def _sum(self, inner: ChannelAffine | None, term: _Constant | None, sign: int) -> ChannelAffine | None:
        if inner is None or term is None or not _axes_agree(inner.axis, term.axis):
            return None
        axis = inner.axis if term.axis is None else term.axis
        return replace(inner, shift=inner.shift + sign * term.value, axis=axis)

    def _batch_norm(self, node: Node) -> ChannelAffine | None:
        if node.op == "call_module":
            norm = self.module.get_submodule(str(node.target))
            if not computes_as(norm, nn.modules.batchnorm._BatchNorm) or not node.args:
                return None
            own = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            return self._normalised(node.args[0], *own, norm.eps)
        if node.target is not F.batch_norm:
            return None
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        tensors = [self._tensor(given.get(name)) for name in names[1:5]]
        computed = any(
            given.get(name) is not None and t is None for name, t in zip(names[1:5], tensors, strict=True)
        )
        if computed or given.get("training", False) is not False:
            return None
        mean, var, weight, bias = tensors
        return self._normalised(given["input"], mean, var, weight, bias, given.get("eps", 1e-5))

    def _normalised(
        self, source: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any
    ) -> ChannelAffine | None:
        if mean is None or var is None:
            return None
        scale = torch.rsqrt(var.double() + eps)
        if weight is not None:
            scale = scale * weight.double()
        shift = -mean.double() * scale
        if bias is not None:
            shift = shift + bias.double()
        return self._sum(self._scaled(source, _Constant(scale, 1)), _Constant(shift, 1), 1)

    def _constant(self, value: Any, node: Node) -> _Constant | None:
        """A number, or a tensor of the model with at most one axis that is longer than one."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _Constant(torch.tensor(float(value), dtype=torch.float64), None)
        tensor = self._tensor(value)
        if tensor is None or not tensor.is_floating_point() or tensor.ndim > len(self.shapes[node]):
            return None
        offset = len(self.shapes[node]) - tensor.ndim
        long = [axis for axis, edge in enumerate(tensor.shape) if edge > 1]
        if len(long) > 1:
            return None
        return _Constant(
            tensor.double().flatten() if long else tensor.double().reshape(()),
            long[0] + offset if long else None,
        )

    def _tensor(self, value: Any) -> torch.Tensor | None:
        """The parameter or buffer that a node reads, also through a view of it."""
        if not isinstance(value, Node):
            return None
        if value.op == "get_attr" and value.target not in self._changing:
            found = attribute(self.module, str(value.target))
            return found.detach() if isinstance(found, torch.Tensor) else None
        if value.op == "call_method" and value.target in _VIEWS and len(value.all_input_nodes) == 1:
            viewed = self._tensor(value.args[0])
            return None if viewed is None else getattr(viewed, str(value.target))(*value.args[1:])
        return None


def _axes_agree(one: int | None, two: int | None) -> bool:
    return one is None or two is None or one == two


def _combined(left: ChannelAffine, right: ChannelAffine, sign: int) -> ChannelAffine | None:
    """`left ± right` where both are affines of the same node and one at least is more than that node."""
    if left.base is not right.base or not _axes_agree(left.axis, right.axis):
        return None
    return ChannelAffine(
        left.base,
        left.scale + sign * right.scale,
        left.shift + sign * right.shift,
        left.axis if right.axis is None else right.axis,
        left.members | right.members,
    )
