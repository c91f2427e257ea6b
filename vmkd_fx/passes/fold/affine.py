"""Read a piece of graph as a channel affine: y = s * x + t with one s and one t for each channel.

A norm's own weight, BatchNorm in evaluation, LayerScale, ResMLP's Affine, a product with a constant and
RIFormer's `affine(n) - n` (Eq. 4) are all this. The recogniser composes:

    s1 (s2 x + t2) + t1 = (s1 s2) x + (s1 t2 + t1)          (s1 x + t1) - (s2 x + t2) = (s1 - s2) x + (t1 -
    t2)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.rewrite import Rewrite, argument, is_call

aten = torch.ops.aten

ONE = torch.ones((), dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class ChannelAffine:
    """`scale * base + shift`, both tensors that broadcast against `base` and differ along one axis at most.

    Attributes:
        base: the node that is scaled.
        scale, shift: with as many axes as `base`, or none.
        members: the nodes that the expression consists of, without `base`.
    """

    base: Node
    scale: torch.Tensor
    shift: torch.Tensor
    members: frozenset[Node]


class AffineReader:
    """Reads the nodes of one graph."""

    def __init__(self, rewrite: Rewrite) -> None:
        self.rewrite = rewrite
        self._readings: dict[Node, ChannelAffine] = {}
        for node in rewrite.graph.nodes:  # in graph order each reading finds those that it builds on
            self._readings[node] = self._reading(node)

    def read(self, node: Node) -> ChannelAffine | None:
        """The largest channel affine that ends in `node`; None if the node is none."""
        found = self._readings.get(node)
        return None if found is None or found.base is node else found

    def _reading(self, node: Node) -> ChannelAffine:
        itself = ChannelAffine(node, ONE, ZERO, frozenset())
        found = self._batch_norm(node) or self._arithmetic(node)
        if found is None or len(long_axes(found.scale) | long_axes(found.shift)) > 1:
            return itself
        if self.rewrite.shape(found.base) != self.rewrite.shape(node):
            return itself
        return replace(found, members=found.members | {node})

    def _arithmetic(self, node: Node) -> ChannelAffine | None:
        if is_call(node, aten.neg):
            return self._scaled(node.args[0], -ONE)
        if is_call(node, aten.addcmul):
            shift, left, right = node.args
            product = self._product(left, right, node)
            scaled = (
                None
                if product is None
                else replace(
                    product,
                    scale=product.scale * argument(node, "value"),
                    shift=product.shift * argument(node, "value"),
                )
            )
            return _sum(scaled, self._constant(shift, node))
        if is_call(node, aten.mul):
            return self._product(node.args[0], node.args[1], node)
        if is_call(node, aten.div) and not argument(node, "rounding_mode"):
            divisor = self._constant(node.args[1], node)
            return None if divisor is None else self._scaled(node.args[0], 1 / divisor)
        if is_call(node, aten.add, aten.sub, aten.rsub):
            left, right = node.args[:2]
            if is_call(node, aten.rsub):
                left, right = right, left
            sign = argument(node, "alpha", 1) * (1 if is_call(node, aten.add) else -1)
            return self._addition(left, right, sign, node)
        return None

    def _addition(self, left: Any, right: Any, sign: float, node: Node) -> ChannelAffine | None:
        """`left + sign * right`."""
        if (constant := self._constant(right, node)) is not None:
            return _sum(self._readings.get(left), sign * constant)
        if (constant := self._constant(left, node)) is not None:
            return _sum(self._scaled(right, sign * ONE), constant)
        one, other = self._readings.get(left), self._scaled(right, sign * ONE)
        if one is None or other is None or one.base is not other.base:
            return None
        return ChannelAffine(
            one.base, one.scale + other.scale, one.shift + other.shift, one.members | other.members
        )

    def _product(self, left: Any, right: Any, node: Node) -> ChannelAffine | None:
        for factor, other in ((left, right), (right, left)):
            if (constant := self._constant(factor, node)) is not None:
                return self._scaled(other, constant)
        return None

    def _scaled(self, node: Any, factor: torch.Tensor) -> ChannelAffine | None:
        inner = self._readings.get(node) if isinstance(node, Node) else None
        if inner is None:
            return None
        return replace(inner, scale=inner.scale * factor, shift=inner.shift * factor)

    def _batch_norm(self, node: Node) -> ChannelAffine | None:
        if not is_call(node, aten.batch_norm) or argument(node, "training"):
            return None
        names = ("running_mean", "running_var", "weight", "bias")
        given = {name: argument(node, name) for name in names}
        held = {name: self.rewrite.constant(source) for name, source in given.items()}
        if any(given[name] is not None and held[name] is None for name in names):
            return None
        mean, variance, weight, bias = (held[name] for name in names)
        if mean is None or variance is None:
            return None
        scale = torch.rsqrt(variance.double() + argument(node, "eps"))
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        rank = len(self.rewrite.shape(node))
        return _sum(self._scaled(node.args[0], along(scale, 1, rank)), along(shift, 1, rank))

    def _constant(self, value: Any, node: Node) -> torch.Tensor | None:
        """A number, or a tensor of the model, in as many axes as `node` has; one at most longer than one."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(float(value), dtype=torch.float64)
        tensor = self.rewrite.constant(value)
        rank = len(self.rewrite.shape(node)) if tensor is not None else 0
        if (
            tensor is None
            or not tensor.is_floating_point()
            or tensor.ndim > rank
            or len(long_axes(tensor)) > 1
        ):
            return None
        return tensor.double().reshape((1,) * (rank - tensor.ndim) + tuple(tensor.shape))


def along(vector: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    """A vector as a tensor of `rank` axes that differs along `axis`."""
    return vector.reshape([-1 if place == axis else 1 for place in range(rank)])


def long_axes(tensor: torch.Tensor) -> frozenset[int]:
    """The axes that are longer than one."""
    return frozenset(axis for axis, edge in enumerate(tensor.shape) if edge > 1)


def _sum(inner: ChannelAffine | None, term: torch.Tensor | None) -> ChannelAffine | None:
    return None if inner is None or term is None else replace(inner, shift=inner.shift + term)
