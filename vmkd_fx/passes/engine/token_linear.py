"""Mix tokens from the left instead of transposing them to the right.

    (W x^T + b)^T  over tokens  =  W x + b 1^T          x (B, N, C), W (M, N): a convolution over C places,
    kernel one

The two transpositions around a token-mixing MLP go, and with a convolution the bias is part of it. Engines
without one-dimensional convolutions get the matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.engine.elementwise import is_elementwise
from vmkd_fx.passes.fold.moves import permutation
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument, is_call

aten = torch.ops.aten


def mix_tokens_from_the_left(rewrite: Rewrite) -> None:
    """Rewrite `transpose, linear, ..., linear, transpose` on (B, N, C)."""
    for end in rewrite.calls(aten.permute, aten.transpose):
        if not _swaps_tokens(rewrite, end):
            continue
        chain = _chain(rewrite, end)
        if not any(is_call(node, aten.linear) for node in chain):
            continue
        if rewrite.take(end, "token mixers without transpositions"):
            _rewrite(rewrite, end, chain)


TOKEN_LINEAR = LoweringPass(
    "token_linear",
    mix_tokens_from_the_left,
    {"channel_affine": "it merges scales into Linear layers over tokens"},
)


def _swaps_tokens(rewrite: Rewrite, node: object) -> bool:
    if not is_call(node, aten.permute, aten.transpose):
        return False
    assert isinstance(node, Node)
    return len(rewrite.shape(node)) == 3 and permutation(node, 3) == [0, 2, 1] and rewrite.batched(node) == 0


def _chain(rewrite: Rewrite, end: Node) -> list[Node]:
    """The Linears and elementwise operators between two transpositions, first to last; empty if there is
    more.
    """
    chain: list[Node] = []
    node = end.args[0]
    while isinstance(node, Node):
        if _swaps_tokens(rewrite, node) and chain:
            return chain
        if len(node.users) != 1 or not (_is_linear(rewrite, node) or is_elementwise(node)):
            return []
        chain.insert(0, node)
        node = node.args[0]
    return []


def _is_linear(rewrite: Rewrite, node: Node) -> bool:
    return is_call(node, aten.linear) and rewrite.constant(argument(node, "weight")) is not None


def _rewrite(rewrite: Rewrite, end: Node, chain: list[Node]) -> None:
    value: Any = chain[0].args[0].args[0]  # type: ignore[union-attr]
    for node in chain:
        if not is_call(node, aten.linear):
            value = rewrite.call(node.target, value, *node.args[1:], **node.kwargs)
            continue
        weight, bias = argument(node, "weight"), argument(node, "bias")
        matrix = rewrite.constant(weight)
        assert matrix is not None
        if rewrite.target.kind == "onnxruntime":
            kernel = rewrite.put(matrix.unsqueeze(-1), like=weight)
            value = rewrite.call(aten.conv1d.default, value, kernel, bias)
            continue
        value = rewrite.call(aten.matmul.default, weight, value)
        if bias is not None:
            column = rewrite.constant(bias)
            assert column is not None
            value = rewrite.call(aten.add.Tensor, value, rewrite.put(column.unsqueeze(-1), like=bias))
    rewrite.replace(end, value)
