"""Merge channel affines into the weights beside them.

    LN(x; g, b) * s + t = LN(x; g s, b s + t)          BN(conv(x; W, b)) = conv(x; s W, s b + t)
    GN(x; g, b), then RIFormer's affine(n) - n, s' = s - 1 (Eq. 4): the same with s' and t

An affine goes into what computes its input, through layouts and averages, if nobody else reads that; else
into everything that reads its result, if each of that can take it, and its scale alone where the shift cannot
go (`s x + t = s (x + t / s)`). All are exact; in float64 they round to
1e-16 a merge. What is refused is listed with its reason: a reader beside the affine, weights used twice,
another axis, a shift into zero padding.
"""

from __future__ import annotations

from torch.fx import Node

from vmkd_fx.passes.fold.absorb import absorb_behind, refusal_behind
from vmkd_fx.passes.fold.affine import AffineReader, ChannelAffine
from vmkd_fx.passes.fold.holders import Holder, holder_of
from vmkd_fx.passes.fold.moves import Pair, backward, moves
from vmkd_fx.passes.fold.push import push_forward
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite


def fold_channel_affines(rewrite: Rewrite) -> None:
    """Fold until nothing more folds."""
    while _fold_once(rewrite):
        rewrite.graph.eliminate_dead_code()


CHANNEL_AFFINE = LoweringPass(
    "channel_affine",
    fold_channel_affines,
    {
        "constants": "it reads scales that views of parameters make",
        "shape_of": "a value that is read for its shape alone keeps its layout",
        "group_norms": "it would write out a norm's weight that can leave the norm",
    },
)


def _fold_once(rewrite: Rewrite) -> int:
    reader = AffineReader(rewrite)
    claimed: set[Node] = set()
    changed: set[Node] = set()
    count = 0
    for node in reversed(list(rewrite.graph.nodes)):
        affine = None if node in claimed else reader.read(node)
        if affine is None:
            continue
        if outside := _read_from_outside(affine, node):
            rewrite.refuse(node, f"{outside.name} inside it is read by other nodes too")
            continue
        claimed |= affine.members
        if affine.base in changed or not affine.members.isdisjoint(changed):
            count += 1  # what it stands on was written anew: the next round reads it
            continue
        count += _fold(rewrite, node, affine, changed)
    return count


def _fold(rewrite: Rewrite, node: Node, affine: ChannelAffine, changed: set[Node]) -> int:
    found = _producer(rewrite, affine)
    if not isinstance(found, str):
        holder, way, pair = found
        if not rewrite.take(node, "into the layer before"):
            return 0
        rewrite.at(way[0] if way else holder.node)
        made = absorb_behind(rewrite, holder, pair)
        holder.node.replace_all_uses_with(made)
        node.replace_all_uses_with(made if affine.base is holder.node else affine.base)
        changed |= {holder.node, node, *affine.members}
        return 1
    behind = push_forward(rewrite, node, affine, changed)
    if isinstance(behind, str):
        rewrite.refuse(node, f"{found}; {behind}")
        return 0
    return behind


def _producer(rewrite: Rewrite, affine: ChannelAffine) -> tuple[Holder, list[Node], Pair] | str:
    """What computes the affine's input and can take it, the layouts on the way, and the affine as it is
    there.
    """
    node, pair, way = affine.base, (affine.scale, affine.shift), []
    readers = set(affine.members)
    while True:
        if not set(node.users) <= readers:
            return f"{node.name} before it is read by other nodes too"
        if not moves(node):
            break
        moved = backward(rewrite, node, pair)
        if moved is None:
            return f"it does not pass {node.name} before it"
        pair, readers = moved, {node}
        way.append(node)
        node = node.args[0]  # type: ignore[assignment]
    holder = holder_of(rewrite, node)
    if isinstance(holder, str):
        return holder
    return refusal_behind(rewrite, holder, pair) or (holder, way[::-1], pair)


def _read_from_outside(affine: ChannelAffine, root: Node) -> Node | None:
    inner = affine.members - {root}
    return next((node for node in inner if not set(node.users) <= affine.members), None)
