"""Move what scales the scores of attention into the weights that make them.

    c (q k^T) = (c q) k^T = q (c k)^T          q = W x + b, or a norm's g n + b:  c q = (c W) x + c b

The factor goes back from a product, through permutations, reshapes and the pieces that q, k and v are cut
into, to the rows of a Linear, a convolution or a norm that nobody else reads. The rows that make the other
pieces stay as they are. Exact up to the rounding of one product a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.engine.pieces import grown, piece_of
from vmkd_fx.passes.fold.absorb import absorb_behind, refusal_behind
from vmkd_fx.passes.fold.holders import Holder, holder_of
from vmkd_fx.passes.fold.moves import Pair, backward, moves
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument, is_call

aten = torch.ops.aten

_ZERO = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class _Taker:
    """The weights that take a factor, and the factor as it is there."""

    holder: Holder
    pair: Pair


def fold_score_scales(rewrite: Rewrite) -> None:
    """Fold every factor before or behind a product of two computed values that finds a taker."""
    for node in rewrite.calls(aten.mul, aten.div):
        found = _factor(rewrite, node)
        if found is None:
            continue
        source, factor = found
        sides = _sides(rewrite, node, source, factor)
        if not sides:
            continue
        takers = [_taker(rewrite, operand, reader, scale) for operand, reader, scale in sides]
        taker = next((taker for taker in takers if isinstance(taker, _Taker)), None)
        if taker is None:
            rewrite.refuse(node, "; ".join(dict.fromkeys(str(reason) for reason in takers)))
        elif rewrite.take(node, "scales of scores into weights"):
            rewrite.at(taker.holder.node)
            taker.holder.node.replace_all_uses_with(absorb_behind(rewrite, taker.holder, taker.pair))
            rewrite.replace(node, source)


SCORE_SCALE = LoweringPass(
    "score_scale", fold_score_scales, {"attention": "it writes down the factor that a fused attention hides"}
)


def _factor(rewrite: Rewrite, node: Node) -> tuple[Node, torch.Tensor] | None:
    """`node` as a computed value times a number, or times a constant that the last two axes share."""
    if argument(node, "rounding_mode") if is_call(node, aten.div) else False:
        return None
    for source, other in (node.args[:2], node.args[1::-1]):
        if is_call(node, aten.div) and other is not node.args[1]:
            continue
        value: Any = other if isinstance(other, (int, float)) else rewrite.constant(other)
        if value is None or not isinstance(source, Node) or rewrite.constant(source) is not None:
            continue
        if isinstance(value, torch.Tensor) and value.is_complex():
            return None
        factor = torch.as_tensor(value, dtype=torch.float64)
        if factor.numel() == 1:
            factor = factor.reshape(())
        shape = rewrite.shape(source)
        if shape != rewrite.shape(node) or (factor.ndim and (factor.ndim < 2 or factor.shape[-2:] != (1, 1))):
            return None
        factor = (
            factor.reshape((1,) * (len(shape) - factor.ndim) + tuple(factor.shape)) if factor.ndim else factor
        )
        return source, 1 / factor if is_call(node, aten.div) else factor
    return None


def _sides(
    rewrite: Rewrite, node: Node, source: Node, factor: torch.Tensor
) -> list[tuple[Node, Node, torch.Tensor]]:
    """The values that may take the factor instead, each with who reads it on the way to the product."""
    if _is_product(rewrite, source) and list(source.users) == [node]:
        return [(operand, source, factor) for operand in source.args[:2] if _fits(rewrite, operand, source)]  # type: ignore[misc]
    last, scale = _last_view(rewrite, node, factor)
    users = list(last.users)
    if len(users) != 1 or not _is_product(rewrite, users[0]) or users[0].args[0] is users[0].args[1]:
        return []
    product = users[0]
    if scale is None or (scale.ndim and scale.shape[-2:] != (1, 1)):
        return [(source, node, factor)]
    other: Any = product.args[1 - product.args.index(last)]
    across = [(other, product, scale)] if _fits(rewrite, other, product) else []
    return [(source, node, factor), *across]


def _last_view(rewrite: Rewrite, node: Node, factor: torch.Tensor) -> tuple[Node, torch.Tensor | None]:
    """What `node` is behind the permutations that read it one after another, and the factor there."""
    scale: torch.Tensor | None = factor
    while len(node.users) == 1 and is_call(user := next(iter(node.users)), aten.permute, aten.transpose):
        if scale is not None and scale.ndim:
            scale = None
        node = user
    return node, scale


def _is_product(rewrite: Rewrite, node: Any) -> bool:
    return is_call(node, aten.matmul, aten.bmm) and all(
        isinstance(operand, Node) and rewrite.constant(operand) is None for operand in node.args[:2]
    )


def _fits(rewrite: Rewrite, operand: Any, product: Node) -> bool:
    """Whether the operand has the product's axes before the last two, so that a factor along them fits it."""
    return rewrite.shape(operand)[:-2] == rewrite.shape(product)[:-2]


def _taker(rewrite: Rewrite, value: Node, reader: Node, factor: torch.Tensor) -> _Taker | str:
    """Who makes `value`, read by `reader` alone, and can take the factor of it; a reason where nobody can."""
    pair: Pair = (factor, _ZERO)
    readers = {reader}
    while True:
        if not set(value.users) <= readers:
            return f"{value} is read by other nodes too"
        if piece := piece_of(rewrite, value):
            whole = grown(rewrite, piece, pair[0])
            if isinstance(whole, str):
                return whole
            value, pair, readers = piece.source, (whole, _ZERO), set(piece.source.users)
        elif moves(value):
            moved = backward(rewrite, value, pair)
            if moved is None:
                return f"it does not pass {value}"
            value, pair, readers = value.args[0], moved, {value}  # type: ignore[assignment]
        else:
            holder = holder_of(rewrite, value)
            if isinstance(holder, str):
                return holder
            return refusal_behind(rewrite, holder, pair) or _Taker(holder, pair)
