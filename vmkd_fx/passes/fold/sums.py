"""Read a piece of graph as a sum of scaled terms and a shift:

    y = s1 * t1 + s2 * t2 + ... + shift

with one s and one shift for each channel. Sums in any association, differences, channel affines between them
(LayerScale, BatchNorm in evaluation, a mean of two) and residuals all are this:

    x + g (a(x) - b(x)) = 1 x + g a(x) - g b(x)

A value that is also read elsewhere is a term as it is, for it has to be computed anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.fold.affine import AffineReader, long_axes
from vmkd_fx.passes.rewrite import Rewrite, argument, is_call

aten = torch.ops.aten

ONE = torch.ones((), dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Term:
    """`scale * node`; `own` says that nobody reads the node beside this sum."""

    node: Node
    scale: torch.Tensor
    own: bool


@dataclass(frozen=True, eq=False)
class Sum:
    """The terms and the shift of a value, and the nodes that it is computed by, without the terms.

    Scales and the shift broadcast against the value; a number that stands in the code has no axes.
    """

    terms: tuple[Term, ...]
    shift: torch.Tensor
    members: frozenset[Node]

    def scaled(self, scale: torch.Tensor, shift: torch.Tensor) -> Sum | None:
        """`scale * self + shift`; None where a factor would differ along two axes."""
        terms = tuple(Term(term.node, term.scale * scale, term.own) for term in self.terms)
        shift = self.shift * scale + shift
        if any(len(long_axes(tensor)) > 1 for tensor in (shift, *(term.scale for term in terms))):
            return None
        return Sum(terms, shift, self.members)

    def plus(self, other: Sum, sign: float) -> Sum | None:
        """`self + sign * other`."""
        turned = other.scaled(sign * ONE, ZERO)
        if turned is None:
            return None
        shift = self.shift + turned.shift
        if len(long_axes(shift)) > 1:
            return None
        return Sum(self.terms + turned.terms, shift, self.members | other.members)


class SumReader:
    """Reads the nodes of one graph."""

    def __init__(self, rewrite: Rewrite) -> None:
        self.rewrite = rewrite
        self.affines = AffineReader(rewrite)

    def read(self, root: Node) -> Sum:
        """The largest sum that ends in `root`; `root` itself as its one term where it is none."""
        whole = self._split(root)
        return whole if whole is not None else _alone(root, own=False)

    def _expanded(self, node: Node, readers: frozenset[Node], shape: tuple[int, ...]) -> Sum:
        """The sum that a node is, if only `readers` read it and it has the sum's shape."""
        own = set(node.users) <= readers
        if not own or self.rewrite.shape(node) != shape:
            return _alone(node, own=own)
        whole = self._split(node)
        return whole if whole is not None else _alone(node, own=True)

    def _split(self, node: Node) -> Sum | None:
        return self._affine(node) or self._addition(node)

    def _affine(self, node: Node) -> Sum | None:
        found = self.affines.read(node)
        if found is None or not all(set(member.users) <= found.members for member in found.members - {node}):
            return None
        inner = self._expanded(found.base, found.members, self.rewrite.shape(node))
        whole = inner.scaled(found.scale, found.shift)
        if whole is None:
            base = _alone(found.base, own=set(found.base.users) <= found.members)
            whole = base.scaled(found.scale, found.shift)
        return None if whole is None else Sum(whole.terms, whole.shift, whole.members | found.members)

    def _addition(self, node: Node) -> Sum | None:
        whole: Sum | None = None
        for value, sign in _summands(node):
            if not isinstance(value, Node) or not isinstance(sign, (int, float)):
                return None
            part = self._expanded(value, frozenset({node}), self.rewrite.shape(node))
            if whole is None:
                whole = part.scaled(sign * ONE, ZERO)
            else:
                alone = _alone(value, own=set(value.users) <= {node})
                whole = whole.plus(part, sign) or whole.plus(alone, sign)
            if whole is None:
                return None
        return None if whole is None else Sum(whole.terms, whole.shift, whole.members | {node})


def _summands(node: Node) -> Iterator[tuple[Any, Any]]:
    """What a node adds up, each with its sign."""
    if not is_call(node, aten.add, aten.sub, aten.rsub):
        return
    left, right = node.args[:2]
    factor = argument(node, "alpha", 1)
    if is_call(node, aten.add):
        yield from ((left, 1), (right, factor))
    elif is_call(node, aten.sub):
        yield from ((left, 1), (right, -factor))
    else:
        yield from ((right, 1), (left, -factor))


def _alone(node: Node, own: bool) -> Sum:
    return Sum((Term(node, ONE, own),), ZERO, frozenset())
