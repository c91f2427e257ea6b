"""Attention with its projections as ONNX Runtime runs it: three matrix products and one operator.

    qkv = W x + b, cut and permuted to q, k, v (B, h, N, d);  softmax(q k^T + mask) v, permuted back
    = attention(Wq x, Wk x, Wv x; b, mask)        each (B, N, h d)

Which rows of W make a query, a key or a value is read off the graph: numbers that name their places go
through its reshapes, permutations and cuts. So any order of heads and pieces is found, and each operand has a
Linear of its own rows; their biases go along. What is not made by a Linear (normalised or rotated queries) is
refused, and so is a mask that differs between images of a batch in a way the operator has no room for.
Exact up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.engine import runtime_operators  # noqa: F401  (registers the operator)
from vmkd_fx.passes.engine.head_rows import Operand, operand_of, read_elsewhere
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument, is_call

aten = torch.ops.aten


@dataclass(frozen=True)
class _Attention:
    """What one operator takes the place of.

    Attributes:
        result: the product with the values, (B, h, N, e).
        operands: queries, keys and values.
        mask: what is added to the scores; None for nothing.
    """

    result: Node
    operands: tuple[Operand, Operand, Operand]
    mask: Node | None


def fuse_attention(rewrite: Rewrite) -> None:
    """Replace every attention whose queries, keys and values Linears make."""
    if rewrite.target.kind != "onnxruntime":
        return
    for node in rewrite.calls(aten.softmax, aten._softmax):
        found = _found(rewrite, node)
        if isinstance(found, str):
            rewrite.refuse(node, found)
        elif found is not None and rewrite.take(found.result, "attention in one operator"):
            rewrite.replace(found.result, _written(rewrite, found))


FUSED_ATTENTION = LoweringPass(
    "fused_attention",
    fuse_attention,
    {
        "attention": "a fused attention hides its scores",
        "score_scale": "the operator has no scale of its own",
    },
)


def _found(rewrite: Rewrite, node: Node) -> _Attention | str | None:
    """The attention around a softmax; None if it is none, a reason if it has to stay."""
    scores, readers = node.args[0], list(node.users)
    rank = len(rewrite.shape(node))
    if argument(node, "dim") % rank != rank - 1 or len(readers) != 1:
        return None
    result, mask, inner = readers[0], None, [node]
    if is_call(scores, aten.add) and argument(scores, "alpha", 1) == 1:  # type: ignore[arg-type]
        inner.append(scores)  # type: ignore[arg-type]
        scores, mask = _addends(scores)
    if not (_is_product(scores) and _is_product(result) and result.args[0] is node):
        return None
    assert isinstance(scores, Node)
    if any(len(between.users) > 1 for between in (scores, *inner)):
        return f"{scores.name} is read by other nodes too"
    if rank != 4 or rewrite.batched(node) != 0:
        return "its scores are not of images, heads, queries and keys"
    if mask is not None and not _fits(rewrite, mask, rewrite.shape(node)):
        return f"{mask.name}, which is added to the scores, differs from image to image"
    query, turned = scores.args[:2]
    operands: list[Operand] = []
    for value, order in ((query, (0, 1, 2, 3)), (turned, (0, 1, 3, 2)), (result.args[1], (0, 1, 2, 3))):
        found = operand_of(rewrite, value, order)
        if isinstance(found, str):
            return found
        operands.append(found)
    one, two, three = operands
    if reason := read_elsewhere(rewrite, operands, {scores, result}):
        return reason
    return _Attention(result, (one, two, three), mask)


def _addends(node: Any) -> tuple[Any, Any]:
    """The product and what is added to it."""
    one, other = node.args[:2]
    return (other, one) if not _is_product(one) else (one, other)


def _is_product(node: Any) -> bool:
    return is_call(node, aten.matmul) and all(isinstance(operand, Node) for operand in node.args[:2])


def _fits(rewrite: Rewrite, mask: Any, scores: tuple[int, ...]) -> bool:
    """Whether the operator can take the mask: whole rows of it, for all images or for each."""
    if not isinstance(mask, Node):
        return False
    shape = rewrite.shape(mask)
    if len(shape) > 4 or shape[-2:] != scores[-2:]:
        return False
    if rewrite.constant(mask) is not None:
        return len(shape) < 4 or shape[0] == 1
    return len(shape) == 4 and rewrite.batched(mask) == 0 and shape[0] == scores[0]


def _written(rewrite: Rewrite, found: _Attention) -> Node:
    """The Linears, the operator, and its result as (B, h, N, e)."""
    bias = _bias(rewrite, found)  # first, for a new weight takes the path of the old one
    weights = [_rows(rewrite, operand) for operand in found.operands]
    projected: list[Node] = []
    for operand, weight in zip(found.operands, weights, strict=True):
        first = all(
            operand.holder.node is not other.holder.node for other in found.operands[: len(projected)]
        )
        like = operand.holder.weight
        assert like is not None
        held = rewrite.put(weight, like=like if first else str(like.target))
        projected.append(_projected(rewrite, operand, held))
    heads = found.operands[0].heads
    operator = torch.ops.vmkd.attention.default
    whole = rewrite.call(operator, *projected, bias, _mask(rewrite, found), heads)
    _, _, tokens, size = rewrite.shape(found.result)
    apart = rewrite.call(aten.reshape.default, whole, [-1, tokens, heads, size])
    return rewrite.call(aten.permute.default, apart, [0, 2, 1, 3])


def _rows(rewrite: Rewrite, operand: Operand) -> torch.Tensor:
    weight = rewrite.constant(operand.holder.weight)
    assert weight is not None
    return weight[operand.rows]


def _projected(rewrite: Rewrite, operand: Operand, weight: Node) -> Node:
    """One operand, (B, N, h d), without its bias."""
    made = rewrite.call(aten.linear.default, operand.holder.node.args[0], weight)
    before = rewrite.shape(operand.holder.node)
    if len(before) == 3 and before[1] == operand.tokens:
        return made
    return rewrite.call(aten.reshape.default, made, [-1, operand.tokens, len(operand.rows)])


def _bias(rewrite: Rewrite, found: _Attention) -> Node | None:
    """The biases of queries, keys and values in turn."""
    like = next((part.holder.bias for part in found.operands if part.holder.bias is not None), None)
    parts = []
    for operand in found.operands:
        bias = rewrite.constant(operand.holder.bias)
        parts.append(
            _rows(rewrite, operand).new_zeros(len(operand.rows)) if bias is None else bias[operand.rows]
        )
    return None if like is None else rewrite.put(torch.cat(parts), like=like)


def _mask(rewrite: Rewrite, found: _Attention) -> Node | None:
    if found.mask is None or len(rewrite.shape(found.mask)) == 4:
        return found.mask
    constant = rewrite.constant(found.mask)
    assert constant is not None
    return rewrite.put(constant.reshape((1,) * (4 - constant.ndim) + tuple(constant.shape)), like=found.mask)
