"""Write attention as the four operators that it is, for engines that would take it apart less well.

    attention(q, k, v; mask) = softmax(q k^T / sqrt(d) + mask) v          q, k (..., N, d), v (..., N, e)

The exporter's own translation scales q and k apart, with a root taken from a shape while the model runs, and
asks for the shape of the mask; this has neither. torch keeps its fused kernel. A mask of truth values becomes
one of 0 and minus infinity, which is exact as long as each query sees a key: where it sees none the fused
kernel gives zeros and a softmax gives NaN, so that such a mask is refused. Vaswani et al. (2017), Eq. 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument

aten = torch.ops.aten


def spell_out_attention(rewrite: Rewrite) -> None:
    """Replace each fused attention by a product, a softmax and a product."""
    if rewrite.target.kind == "torch":
        return
    for node in rewrite.calls(aten.scaled_dot_product_attention):
        if reason := _refusal(rewrite, node):
            rewrite.refuse(node, reason)
        elif rewrite.take(node, "attention spelled out"):
            rewrite.replace(node, _explicit(rewrite, node))


ATTENTION = LoweringPass(
    "attention", spell_out_attention, {"constants": "a mask that is computed from constants counts as one"}
)


def additive(mask: torch.Tensor, like: torch.dtype) -> torch.Tensor:
    """A mask of truth values as what is added to the scores: 0 to keep, minus infinity to leave out."""
    return torch.zeros(mask.shape, dtype=like).masked_fill(mask.logical_not(), -math.inf)


def _refusal(rewrite: Rewrite, node: Node) -> str | None:
    if argument(node, "dropout_p"):
        return "it drops scores at random"
    if argument(node, "enable_gqa", False):
        return "its heads share keys"
    mask = argument(node, "attn_mask")
    operands: Any = node.args[:2]
    if argument(node, "is_causal"):
        grows = any(rewrite.batched(given) == len(rewrite.shape(given)) - 2 for given in operands)
        return "its sequences grow with the batch" if grows else None
    if mask is None or rewrite.held(mask)[0].dtype != torch.bool:
        return None
    known = rewrite.constant(mask)
    if known is None:
        return "its mask of truth values is computed, and may hide every key from a query"
    return None if bool(known.any(-1).all()) else "its mask hides every key from a query"


def _explicit(rewrite: Rewrite, node: Node) -> Node:
    query, key, value = node.args[:3]
    assert isinstance(query, Node) and isinstance(key, Node)
    scale = argument(node, "scale", 1 / math.sqrt(rewrite.shape(query)[-1]))
    scaled = query if scale == 1 else rewrite.call(aten.mul.Tensor, query, float(scale))
    scores = rewrite.call(aten.matmul.default, scaled, rewrite.call(aten.transpose.int, key, -2, -1))
    mask = _mask(rewrite, node, query, key)
    if mask is not None:
        scores = rewrite.call(aten.add.Tensor, scores, mask)
    weights = rewrite.call(aten.softmax.int, scores, -1)
    return rewrite.call(aten.matmul.default, weights, value)


def _mask(rewrite: Rewrite, node: Node, query: Node, key: Node) -> Any:
    mask, dtype = argument(node, "attn_mask"), rewrite.held(query)[0].dtype
    if argument(node, "is_causal"):
        lower = torch.ones(rewrite.shape(query)[-2], rewrite.shape(key)[-2], dtype=torch.bool).tril()
        return rewrite.put(additive(lower, dtype))
    known = rewrite.constant(mask)
    if known is None or known.dtype != torch.bool:
        return mask
    return rewrite.put(additive(known, dtype), like=mask)
