"""Convolutions, Linears, averages and identities as one kind of linear map; sums and compositions of two.

    y[o, i] = bias[o] + sum over c, j of weight[o, c, j] * x[c, stride * i - padding + dilation * j]

with x zero outside. A Linear has no place axis, an identity and a scale of channels have one tap, an average
has equal taps. Two sum up to the map whose taps are those of both; two in a row compose:

    stride * i - padding + dilation * j  of the second, put into the first:
    s1 s2 i - (s1 p2 + p1) + (s1 d2 j2 + d1 j1)

A second map that pads reads zeros where the first would have given values, so that they compose only where
the first has one tap, no padding and no bias along that axis. Exact up to rounding, 1e-16 a sum, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, prod
from typing import Any

import torch

Edges = tuple[int, ...]
Index = tuple[Any, ...]


@dataclass(frozen=True)
class Form:
    """The shape of a linear map.

    Attributes:
        outputs, inputs: channels.
        kernel, stride, padding, dilation: for each place axis; all empty for a Linear.
        groups: blocks of channels that do not mix.
    """

    outputs: int
    inputs: int
    kernel: Edges = ()
    stride: Edges = ()
    padding: Edges = ()
    dilation: Edges = ()
    groups: int = 1

    @property
    def weights(self) -> int:
        """How many numbers the kernel has: also its multiply-adds at each place."""
        return self.outputs * (self.inputs // self.groups) * prod(self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether it works at each place alone."""
        return set(self.kernel) <= {1} and set(self.stride) <= {1} and not any(self.padding)

    def size(self, places: Sequence[int]) -> Edges:
        """The places of its result."""
        rows = zip(places, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((edge + 2 * p - d * (k - 1) - 1) // s + 1 for edge, k, s, p, d in rows)

    def with_axes(self, count: int) -> Form:
        """A pointwise map over this many place axes."""
        one, zero = (1,) * count, (0,) * count
        return Form(self.outputs, self.inputs, one, one, zero, one, self.groups)


@dataclass(frozen=True)
class LinearMap:
    """A linear map: weight (outputs, inputs / groups, *kernel), bias (outputs,) or None, in float64."""

    form: Form
    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def with_axes(self, count: int) -> LinearMap:
        """A pointwise map over this many place axes."""
        shape = (*self.weight.shape[:2], *(1 for _ in range(count)))
        return LinearMap(self.form.with_axes(count), self.weight.reshape(shape), self.bias)


def sum_form(one: Form, other: Form) -> Form | str:
    """The form of the sum of two maps of one input, or why there is none."""
    if (one.outputs, one.inputs, len(one.kernel)) != (other.outputs, other.inputs, len(other.kernel)):
        return "their channels differ"
    if one.stride != other.stride:
        return f"their strides {one.stride} and {other.stride} differ"
    kernel, padding, dilation = [], [], []
    for axis in range(len(one.kernel)):
        rows = [(form.kernel[axis], form.padding[axis], form.dilation[axis]) for form in (one, other)]
        first = -max(p for _, p, _ in rows)
        last = max(d * (k - 1) - p for k, p, d in rows)
        step = gcd(rows[0][1] - rows[1][1], *(d for k, _, d in rows if k > 1)) or 1
        kernel.append((last - first) // step + 1)
        padding.append(-first)
        dilation.append(step)
    edges = (tuple(kernel), one.stride, tuple(padding), tuple(dilation))
    return Form(one.outputs, one.inputs, *edges, gcd(one.groups, other.groups))


def composed_form(second: Form, first: Form, has_bias: bool) -> Form | str:
    """The form of `second` after `first`, or why there is none; both over the same number of place axes."""
    if any(second.padding) and has_bias:
        return "the second pads with zeros where the first would give its bias"
    kernel, stride, padding, dilation = [], [], [], []
    for axis in range(len(first.kernel)):
        k1, s1, p1, d1 = (getattr(first, name)[axis] for name in ("kernel", "stride", "padding", "dilation"))
        k2, s2, p2, d2 = (getattr(second, name)[axis] for name in ("kernel", "stride", "padding", "dilation"))
        if p2 and (k1 > 1 or p1):
            return "the second pads with zeros where the first would give values of the border"
        step = gcd(d1 if k1 > 1 else 0, s1 * d2 if k2 > 1 else 0) or 1
        kernel.append(((k1 - 1) * d1 + (k2 - 1) * s1 * d2) // step + 1)
        stride.append(s1 * s2)
        padding.append(p1 + s1 * p2)
        dilation.append(step)
    edges = (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    return Form(second.outputs, first.inputs, *edges, gcd(first.groups, second.groups))


def add_maps(maps: Sequence[LinearMap], form: Form) -> LinearMap:
    """The sum of maps of one input, written in `form`, which has room for each of them."""
    weight = torch.stack([placed(part.weight, part.form, form) for part in maps]).sum(0)
    biases = [part.bias for part in maps if part.bias is not None]
    return LinearMap(form, weight, torch.stack(biases).sum(0) if biases else None)


def compose_maps(second: LinearMap, first: LinearMap, form: Form) -> LinearMap:
    """`second` after `first`, written in the form that `composed_form` gives."""
    groups = form.groups
    outer = in_groups(second.weight, second.form.groups, groups).unflatten(0, (groups, -1))
    inner = in_groups(first.weight, first.form.groups, groups).unflatten(0, (groups, -1))
    weight = outer.new_zeros(groups, outer.shape[1], inner.shape[2], *form.kernel)
    for tap in product(*(range(edge) for edge in second.form.kernel)):
        rows = zip(tap, first.form.stride, second.form.dilation, form.dilation, strict=True)
        starts = [j * s1 * d2 // step for j, s1, d2, step in rows]
        at: Index = (..., *tap)
        weight[_taps(starts, first.form, form)] += torch.einsum("goc,gci...->goi...", outer[at], inner)
    bias = second.bias
    if first.bias is not None:
        by_tap = outer.flatten(3).sum(3) if outer.ndim > 3 else outer
        moved = torch.einsum("goc,gc->go", by_tap, first.bias.reshape(groups, -1)).flatten()
        bias = moved if bias is None else bias + moved
    return LinearMap(form, weight.flatten(0, 1), bias)


def placed(weight: torch.Tensor, form: Form, target: Form) -> torch.Tensor:
    """The kernel of a map of this form among the taps and in the groups of another."""
    weight = in_groups(weight, form.groups, target.groups)
    rows = zip(target.padding, form.padding, target.dilation, strict=True)
    starts = [(wide - narrow) // step for wide, narrow, step in rows]
    if form.kernel == target.kernel and not any(starts):
        return weight
    wide = weight.new_zeros(*weight.shape[:2], *target.kernel)
    wide[_taps(starts, form, target)] = weight
    return wide


def in_groups(weight: torch.Tensor, groups: int, fewer: int) -> torch.Tensor:
    """A kernel in `groups` as one in `fewer`, which divide them: zeros where channels do not mix."""
    ratio = groups // fewer
    if ratio == 1:
        return weight
    blocks = weight.unflatten(0, (fewer, ratio, -1))  # (fewer, ratio, outputs, inputs, *kernel)
    wide = blocks.new_zeros(*blocks.shape[:3], ratio, *blocks.shape[3:])
    wide.diagonal(dim1=1, dim2=3).copy_(blocks.movedim(1, -1))
    return wide.flatten(3, 4).flatten(0, 2)


def diagonal(scale: torch.Tensor, axes: int) -> LinearMap:
    """A scale (C,) of the channels, ones for the identity, over this many place axes."""
    channels = len(scale)
    if not axes:
        return LinearMap(Form(channels, channels, groups=channels), scale.reshape(channels, 1))
    form = Form(channels, channels, groups=channels).with_axes(axes)
    return LinearMap(form, scale.reshape(channels, 1, *form.kernel))


def average(form: Form) -> LinearMap:
    """An average over the taps of a form that has each channel in a group of its own."""
    taps = torch.full((form.outputs, 1, *form.kernel), 1 / prod(form.kernel), dtype=torch.float64)
    return LinearMap(form, taps)


def _taps(starts: Sequence[int], form: Form, target: Form) -> Index:
    """Which taps of `target` those of `form` are, as an index into its kernel."""
    rows = zip(starts, form.kernel, form.dilation, target.dilation, strict=True)
    taps = []
    for start, k, d, step in rows:
        apart = d // step if k > 1 else 1
        taps.append(slice(start, start + (k - 1) * apart + 1, apart))
    return (..., *taps)
