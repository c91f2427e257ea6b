"""Push a channel affine behind what reads it, until matrices or constants take it everywhere.

    W (s x + t) + b = (W s) x + (b + W t)        (s p + t) - (s n + t) = s (p - n)        g (s x) = (g s) x
    s x + t = s (x + t / s)

The second is PoolFormer's pooling minus its input: the norm's shift cancels and its scale goes on. The last
is for a shift that cannot go on, into zero padding say: its scale does, and one addition stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.fold.absorb import absorb_before, refusal_before
from vmkd_fx.passes.fold.affine import ZERO, ChannelAffine
from vmkd_fx.passes.fold.holders import holder_of
from vmkd_fx.passes.fold.moves import Pair, forward, moves
from vmkd_fx.passes.rewrite import Rewrite, argument, is_call

aten = torch.ops.aten

Change = Callable[[], None]


@dataclass(frozen=True)
class _Plan:
    """What has to change behind an affine, and the nodes on the way and at its ends."""

    changes: list[Change]
    touched: set[Node]


def push_forward(rewrite: Rewrite, root: Node, affine: ChannelAffine, changed: set[Node]) -> int | str:
    """Take the affine that ends in `root`, or its scale alone, away if everything behind can take it; else
    the reason.
    """
    plan, centre = _plan(rewrite, root, (affine.scale, affine.shift), changed), None
    if isinstance(plan, str):
        centre = _centre(affine)
        scale = plan if centre is None else _plan(rewrite, root, (affine.scale, ZERO), changed)
        if isinstance(scale, str):
            return plan
        plan = scale
    if not rewrite.take(root, "into what is behind" if centre is None else "scales into what is behind"):
        return 0
    base = affine.base
    if centre is not None:
        base = rewrite.call(aten.add.Tensor, base, rewrite.put(centre))
    for change in plan.changes:
        change()
    root.replace_all_uses_with(base)
    changed |= {root, *affine.members, *plan.touched}
    return 1


def _centre(affine: ChannelAffine) -> torch.Tensor | None:
    """t / s, where adding it is less than what computes the affine now; None elsewhere."""
    scale, shift = affine.scale, affine.shift
    splits = bool(shift.any()) and bool((scale != 0).all()) and not bool((scale == 1).all())
    return shift / scale if splits and len(affine.members) > 1 else None


def _plan(rewrite: Rewrite, root: Node, pair: Pair, changed: set[Node]) -> _Plan | str:
    """How everything behind `root` takes the affine; else the reason why it cannot."""
    carried: dict[Node, Pair] = {root: pair}
    changes: list[Change] = []
    ends: set[Node] = set()
    pending = _readers(root)
    order = {node: place for place, node in enumerate(rewrite.graph.nodes)}
    while pending:
        node = min(pending, key=order.__getitem__)
        pending.discard(node)
        if node.op == "output" or node in changed:
            return f"{node.name} reads it"
        found = _through(rewrite, node, carried)
        if isinstance(found, str):
            return found
        if isinstance(found, tuple):
            carried[node] = found
            pending |= _readers(node)
        else:
            changes.append(found)
            ends.add(node)
    if len(ends) == 0:
        return "nobody reads it"
    return _Plan(changes, {*carried, *ends})


def _readers(node: Node) -> set[Node]:
    return set(node.users)


def _through(rewrite: Rewrite, node: Node, carried: dict[Node, Pair]) -> Pair | Change | str:
    """The affine behind `node`, or what has to change there for none to be left, or why there is neither."""
    sources = [source for source in node.all_input_nodes if source in carried]
    if is_call(node, aten.add, aten.sub) and len(sources) == 2 == len(set(node.args[:2])):
        return _joined(node, carried)
    if len(sources) != 1 or node.args.count(sources[0]) != 1:
        return f"{node.name} reads it in several places"
    source = sources[0]
    pair = carried[source]
    if moves(node) and node.args[0] is source:
        return forward(rewrite, node, pair) or f"it does not pass {node.name} behind it"
    if is_call(node, aten.mul, aten.div) and not bool(pair[1].any()):
        return _into_factor(rewrite, node, source, pair[0])
    if node.args[0] is not source:
        return f"{node.name} behind it does not read it as its input"
    holder = holder_of(rewrite, node)
    if isinstance(holder, str):
        return f"{holder}, which reads it"
    if reason := refusal_before(rewrite, holder, pair):
        return reason

    def change() -> None:
        rewrite.at(node)
        node.replace_all_uses_with(absorb_before(rewrite, holder, node.args[0], pair))  # type: ignore[arg-type]

    return change


def _joined(node: Node, carried: dict[Node, Pair]) -> Pair | str:
    """A sum of two that carry the same scale carries it too."""
    (one, shift), (other, taken) = (carried[source] for source in node.args[:2])  # type: ignore[index]
    if one.shape != other.shape or not torch.equal(one, other):
        return f"what {node.name} adds up is scaled differently"
    sign = argument(node, "alpha", 1) * (1 if is_call(node, aten.add) else -1)
    return one, shift + sign * taken


def _into_factor(rewrite: Rewrite, node: Node, source: Node, scale: torch.Tensor) -> Change | str:
    """A factor of the model takes the scale."""
    (other,) = (argument_ for argument_ in node.args[:2] if argument_ is not source)
    value: Any = (
        torch.tensor(float(other), dtype=torch.float64)
        if isinstance(other, (int, float))
        else rewrite.constant(other)
    )
    if value is None or (is_call(node, aten.div) and node.args[0] is not source):
        return f"{node.name} behind it has no constant that could take it"
    if isinstance(other, Node) and rewrite.readers(other) > 1:
        return f"the factor of {node.name} is used {rewrite.readers(other)} times"
    rank = len(rewrite.shape(node))
    if value.ndim:
        value = value.reshape((1,) * (rank - value.ndim) + tuple(value.shape))
    product = scale / value if is_call(node, aten.div) else scale * value

    def change() -> None:
        rewrite.at(node)
        factor = rewrite.put(product, like=other if isinstance(other, Node) else None)
        node.replace_all_uses_with(rewrite.call(aten.mul.Tensor, node.args[node.args.index(source)], factor))

    return change
