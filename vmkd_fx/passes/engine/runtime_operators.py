"""Attention as ONNX Runtime has it, as an operator of torch: one node until the export.

    y[n, head] = sum over m of softmax(q[n, head] . k[m, head] + mask[head, n, m]) v[m, head]

It takes tokens as they leave their Linears, and so needs no transposition; the scores are never written.
Vaswani et al. (2017), section 3.2.2. It infers only, and is registered where this module is imported.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("vmkd::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int
) -> Tensor:
    """Attention without a scale: that is in the weights.

    Args:
        query: (B, N, heads * d).
        key: (B, M, heads * d).
        value: (B, M, heads * e).
        bias: (heads * (2 d + e),), of query, key and value in turn; None for none.
        mask: (1 or B, 1 or heads, N, M), added to the scores; None for none.
        heads: how many there are.

    Returns:
        (B, N, heads * e).
    """
    parts = [query, key, value]
    if bias is not None:
        sizes = [part.shape[-1] for part in parts]
        parts = [part + term for part, term in zip(parts, bias.split(sizes), strict=True)]
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    scores = q @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).contiguous()


@attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int
) -> Tensor:
    return query.new_empty((*query.shape[:2], value.shape[2]))


@register_flop_formula(torch.ops.vmkd.attention)
def _(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object) -> int:
    batch, tokens, width = query
    return 2 * batch * tokens * key[1] * (width + value[2])
