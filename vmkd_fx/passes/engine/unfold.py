"""Neighbourhoods as convolutions: engines have no operator that cuts them out or adds them up.

    im2col(x)[b, (c, i), l] = x[b, c, place l + offset i]     =  conv(x, e), C groups, e_i one at offset i
    col2im(y)[b, c, p] = sum of y[b, (c, i), l] over place l + offset i = p     =  its transpose

ONNX writes the first as fourteen nodes of shape arithmetic and gathers; TensorRT refuses Col2Im, which is
the second. Exact: each sum has the same terms, and zeros. VOLO's outlook attention is made of both.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument

aten = torch.ops.aten


def unfold_by_convolution(rewrite: Rewrite) -> None:
    """Rewrite `im2col` and `col2im` of batches, where the target is no torch."""
    if rewrite.target.kind == "torch":
        return
    for node in rewrite.calls(aten.im2col, aten.col2im):
        cuts = node.target is aten.im2col.default
        source: Any = node.args[0]
        if len(rewrite.shape(source)) != (4 if cuts else 3) or rewrite.batched(source) != 0:
            rewrite.refuse(node, "its operand is a single image")
        elif rewrite.take(node, "neighbourhoods cut out" if cuts else "neighbourhoods added up"):
            rewrite.replace(node, _cut(rewrite, node, source) if cuts else _added(rewrite, node, source))


LARGEST = 9
"""Offsets that one convolution cuts out; more are cut along the rows first and then along the columns."""

UNFOLD = LoweringPass("unfold", unfold_by_convolution)


def _cut(rewrite: Rewrite, node: Node, source: Node) -> Node:
    kernel, dilation, padding, stride = _window(node)
    channels = rewrite.shape(source)[1]
    value = source
    for axes in ((0,), (1,)) if prod(kernel) > LARGEST else ((0, 1),):
        here = [
            [of[axis] if axis in axes else rest for axis in (0, 1)]
            for of, rest in ((kernel, 1), (stride, 1), (padding, 0), (dilation, 1))
        ]
        weight = rewrite.put(_offsets(channels, here[0]))
        value = rewrite.call(aten.conv2d.default, value, weight, None, *here[1:], channels)
        channels *= prod(here[0])
    return rewrite.call(aten.reshape.default, value, [-1, *rewrite.shape(node)[1:]])


def _added(rewrite: Rewrite, node: Node, source: Node) -> Node:
    kernel, dilation, padding, stride = _window(node)
    size = rewrite.shape(node)[-2:]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    places = [(edge + 2 * p - r) // s + 1 for edge, p, r, s in zip(size, padding, reach, stride, strict=True)]
    rest = [
        edge - ((n - 1) * s - 2 * p + r)
        for edge, n, s, p, r in zip(size, places, stride, padding, reach, strict=True)
    ]
    entries = rewrite.shape(source)[1]
    channels = entries // prod(kernel)
    value = rewrite.call(aten.reshape.default, source, [-1, entries, *places])
    weight = rewrite.put(_offsets(channels, kernel))
    return rewrite.call(
        aten.conv_transpose2d.input, value, weight, None, stride, padding, rest, channels, dilation
    )


def _window(node: Node) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, dilation, padding and stride, of two numbers each."""
    kernel, dilation, padding, stride = (
        list(argument(node, name)) for name in ("kernel_size", "dilation", "padding", "stride")
    )
    return kernel, dilation, padding, stride


def _offsets(channels: int, kernel: list[int]) -> torch.Tensor:
    """For each channel a kernel an offset that is one there: (C kh kw, 1, kh, kw)."""
    one = torch.eye(prod(kernel), dtype=torch.float64).reshape(-1, 1, *kernel)
    return one.repeat(channels, 1, 1, 1)
