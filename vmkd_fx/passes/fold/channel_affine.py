"""Merge channel affines into the weights beside them.

    LN(x; g, b) * s + t = LN(x; g s, b s + t)          BN(conv(x; W, b)) = conv(x; s W, s b + t)
    GN(x; g, b), then RIFormer's affine(n) - n, s' = s - 1 (Eq. 4): the same with s' and t

An affine goes into what computes its input if nobody else reads that; else into the one matrix that reads its
result. Both are exact; in float64 they round to 1e-16 a merge and are held to 1e-12 for the whole graph. What
is refused is listed with its reason: a reader beside the affine, weights used twice, another axis, a shift
into zero padding.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.fx import Node

from vmkd_fx.graph.edit import drop_dead_nodes, written_to
from vmkd_fx.graph.shapes import Shape, node_shapes
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.evaluation import drop_unused
from vmkd_fx.passes.fold.absorb import Weights, absorb_before, absorb_behind, parameter_uses
from vmkd_fx.passes.fold.affine import AffineReader, ChannelAffine, may_be_affine
from vmkd_fx.passes.record import Record
from vmkd_fx.steps import Refusal


@torch.no_grad()
def fold_channel_affines(module: TracedModule) -> tuple[TracedModule, Record]:
    """Fold until nothing more folds; `module` is specialised to evaluation and owns its parameters."""
    matched, behind = 0, 0
    while True:
        found, into_producers, refused = _fold_once(module)
        matched, behind = matched + found, behind + into_producers
        if not found:
            break
    detail = f"{behind} into the layer before, {matched - behind} into the layer behind"
    return drop_unused(module) if matched else module, Record(
        matched, detail if matched else "", tuple(refused)
    )


def _fold_once(module: TracedModule) -> tuple[int, int, list[Refusal]]:
    if not any(may_be_affine(module, node) for node in module.graph.nodes):
        return 0, 0, []
    shapes = node_shapes(module)
    reader = AffineReader(module, shapes)
    counts = parameter_uses(module)
    claimed: set[Node] = set()
    matched, behind, refused = 0, 0, []
    for node in reversed(list(module.graph.nodes)):
        affine = None if node in claimed else reader.read(node)
        if affine is None:
            continue
        if outside := _read_from_outside(affine, node):
            refused.append(Refusal(node.name, f"{outside.name} inside it is read by other nodes too"))
            continue
        claimed |= affine.members
        side, reason = _absorb(module, node, affine, shapes, counts)
        if reason:
            refused.append(Refusal(node.name, reason))
            continue
        node.replace_all_uses_with(affine.base)
        for member in reversed([n for n in module.graph.nodes if n in affine.members]):
            module.graph.erase_node(member)
        matched, behind = matched + 1, behind + (side == "behind")
    drop_dead_nodes(module)
    module.recompile()
    return matched, behind, refused


def _read_from_outside(affine: ChannelAffine, root: Node) -> Node | None:
    inner = affine.members - {root}
    return next((node for node in inner if not set(node.users) <= affine.members), None)


def _absorb(
    module: TracedModule, root: Node, affine: ChannelAffine, shapes: dict[Node, Shape], counts: Counter[int]
) -> tuple[str, str]:
    """Try the producer, then the consumer; returns the side that took it, or "" and the reasons."""
    rank = len(shapes[root])
    if written_to(affine.base, module):
        return "", f"{affine.base.name} before it is changed in place"
    if set(affine.base.users) <= affine.members:
        first = absorb_behind(Weights(module, affine.base), affine, rank, counts)
        if first is None:
            return "behind", ""
    else:
        first = f"{affine.base.name} before it is read by other nodes too"
    if len(root.users) != 1:
        return "", f"{first}; {len(root.users)} nodes read it"
    consumer = next(iter(root.users))
    if consumer.args[:1] != (root,) or root in consumer.args[1:]:
        return "", f"{first}; {consumer.name} behind it does not read it as its input"
    second = absorb_before(Weights(module, consumer), affine, rank, counts)
    return ("", f"{first}; {second}") if second else ("before", "")
