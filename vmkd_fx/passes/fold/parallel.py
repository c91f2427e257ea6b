"""Merge linear branches of one input that are summed: structural re-parameterisation, found in the graph.

    conv(x; W1, b1) + g * (conv(x; W2, b2) - x) + c = conv(x; W1 + g (W2 - I), b1 + g b2 + c)

The kernels stand in one frame: a small one in the middle of a large one, groups as blocks on the diagonal,
the identity as a single tap. RepVGG (arXiv:2101.03697, section 3.3), MobileOne (arXiv:2206.04040), RepViT
(arXiv:2307.09283) and FastViT (arXiv:2303.14189, Eq. 4) are cases of it. A site is taken if it leaves fewer
nodes, and never more weights. Exact up to rounding, 1e-16 a term, in float64. What stays is listed with its
reason: other strides, other borders, a branch that is read elsewhere, weights used twice, a larger kernel.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from vmkd_fx.passes.fold.absorb import scale_rows
from vmkd_fx.passes.fold.affine import long_axes
from vmkd_fx.passes.fold.branches import Branch, Merged, Plan, plan
from vmkd_fx.passes.fold.linear_map import LinearMap, add_maps, diagonal
from vmkd_fx.passes.fold.map_nodes import write_map
from vmkd_fx.passes.fold.sums import ONE, ZERO, Sum, SumReader, Term
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite

aten = torch.ops.aten

Scaled = tuple[Node, torch.Tensor]
"""A node and its factor."""


def merge_parallel(rewrite: Rewrite) -> None:
    """Merge until nothing more merges."""
    while _merge_once(rewrite):
        rewrite.graph.eliminate_dead_code()


PARALLEL = LoweringPass(
    "parallel",
    merge_parallel,
    {
        "constants": "it reads scales that are computed from parameters",
        "channel_affine": "a BatchNorm between a convolution and the sum hides the convolution",
    },
)


def _merge_once(rewrite: Rewrite) -> int:
    reader = SumReader(rewrite)
    claimed: set[Node] = set()
    count = 0
    for node in reversed(list(rewrite.graph.nodes)):
        if node.op != "call_function" or node in claimed:
            continue
        whole = reader.read(node)
        if len(whole.terms) < 2 or not whole.members.isdisjoint(claimed):
            continue
        made = plan(rewrite, whole, rewrite.shape(node))
        used = whole.members | {
            branch.node.node for part in made.merged for branch in part.branches if branch.node
        }
        if not made.merged or _nodes(made, whole) >= len(used):
            if made.reasons:
                rewrite.refuse(node, made.reasons[0])
            continue
        if rewrite.take(node, _what(made)):
            rewrite.replace(node, _written(rewrite, made, whole))
            count += 1
            claimed |= used
    return count


def _what(made: Plan) -> str:
    joined = [merged for merged in made.merged if len(merged.branches) > 1]
    if not joined:
        return "scale into the branches"
    branches = sum(len(merged.branches) for merged in joined)
    return f"into {'one' if len(joined) == 1 else len(joined)} from {branches} branches"


def _nodes(made: Plan, whole: Sum) -> int:
    """How many nodes the sum takes once it is written as planned."""
    scaled = [term for term in made.rest if not _is_sign(term.scale)]
    terms = len(made.merged) + len(made.rest)
    may_shift = whole.shift.ndim > 0 or not _is_zero(whole.shift)  # by what the code says, not by the numbers
    left_over = int(may_shift and _place_of_shift(made, whole) is None)
    return len(made.merged) + len(scaled) + terms - 1 + left_over


def _written(rewrite: Rewrite, made: Plan, whole: Sum) -> Node:
    """The sum as new nodes."""
    place = _place_of_shift(made, whole)
    results: list[Scaled] = []
    for merged in made.merged:
        results.append((_merged_map(rewrite, merged, whole.shift if merged is place else ZERO), ONE))
    for term in made.rest:
        results.append(_scaled(rewrite, term))
    results.sort(key=lambda item: float(item[1]) < 0)  # stable: what is subtracted comes behind
    total, _ = results[0]
    for node, sign in results[1:]:
        total = rewrite.call(aten.sub.Tensor if sign < 0 else aten.add.Tensor, total, node)
    if place is None and not _is_zero(whole.shift):
        total = rewrite.call(aten.add.Tensor, total, _factor(rewrite, whole.shift))
    return total


def _merged_map(rewrite: Rewrite, merged: Merged, shift: torch.Tensor) -> Node:
    """The node of one merged map, with a shift of its result in its bias."""
    like = merged.largest
    if len(merged.branches) == 1 and _is_zero(shift) and _is_one(merged.branches[0].scale):
        return like.node
    parts = [_scaled_map(rewrite, branch) for branch in merged.branches]
    added = add_maps(parts, merged.form)
    if not _is_zero(shift):
        moved = _by_channel(shift, merged.form.outputs)
        added = LinearMap(added.form, added.weight, moved if added.bias is None else added.bias + moved)
    return write_map(rewrite, added, merged.branches[0].source, like)


def _scaled_map(rewrite: Rewrite, branch: Branch) -> LinearMap:
    scale = _by_channel(branch.scale, branch.form.outputs)
    if branch.node is None:
        return diagonal(scale, len(branch.form.kernel))
    found = branch.node.read(rewrite)
    weight, bias = scale_rows(found.weight, found.bias, scale, torch.zeros_like(scale))
    return LinearMap(found.form, weight, bias if found.bias is not None else None)


def _scaled(rewrite: Rewrite, term: Term) -> Scaled:
    """A term that stays, and its sign."""
    if _is_sign(term.scale):
        return term.node, term.scale
    return rewrite.call(aten.mul.Tensor, term.node, _factor(rewrite, term.scale)), ONE


def _factor(rewrite: Rewrite, tensor: torch.Tensor) -> Node | float:
    return rewrite.put(tensor) if tensor.ndim else float(tensor)


def _place_of_shift(made: Plan, whole: Sum) -> Merged | None:
    """Whose bias takes the shift."""
    for merged in made.merged:
        if long_axes(whole.shift) <= {merged.largest.channel_axis}:
            return merged
    return None


def _by_channel(tensor: torch.Tensor, channels: int) -> torch.Tensor:
    """A broadcasting tensor that differs along the channels alone, as a vector."""
    return tensor.reshape(-1).expand(channels)


def _is_zero(shift: torch.Tensor) -> bool:
    return not bool(shift.any())


def _is_one(scale: torch.Tensor) -> bool:
    return scale.ndim == 0 and float(scale) == 1


def _is_sign(scale: torch.Tensor) -> bool:
    return scale.ndim == 0 and abs(float(scale)) == 1
