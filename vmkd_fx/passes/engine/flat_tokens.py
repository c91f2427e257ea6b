"""Run what treats tokens one by one on all of them as one matrix, (B N, C) instead of (B, N, C).

    x W^T + b  on two axes is one Gemm; on three it is a matrix product and an addition of its own

Linear layers, norms over channels, activations and sums of such values form regions, and reshapes that keep
the channels are none inside one. A region changes its shape where that saves more additions and reshapes than
it costs reshapes; next to another reshape one costs nothing, for the two become one.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.engine.elementwise import is_elementwise
from vmkd_fx.passes.fold.moves import RESHAPES
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument, is_call

aten = torch.ops.aten


def flatten_tokens(rewrite: Rewrite) -> None:
    """Flatten every region for which it pays."""
    for region in _regions(rewrite):
        entries = _entries(rewrite, region)
        exits = [node for node in region if any(user not in region for user in node.users)]
        saved = sum(is_call(node, aten.linear) and argument(node, "bias") is not None for node in region)
        saved += sum(_keeps_channels(rewrite, node) for node in region)
        cost = sum(not _enters_freely(rewrite, source) for source in entries) + sum(
            not _leaves_freely(node, region) for node in exits
        )
        if saved <= cost:
            continue
        first = next(iter(region))
        if rewrite.take(first, "regions of tokens as one matrix"):
            _flatten(rewrite, region)


FLAT_TOKENS = LoweringPass("flat_tokens", flatten_tokens)


def _regions(rewrite: Rewrite) -> list[dict[Node, None]]:
    """Connected members with the same axes before their channels, in order."""
    parent: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in _members(rewrite):
        parent[node] = node
        for source in node.all_input_nodes:
            if source in parent and _in_step(rewrite, source, node):
                parent[root(source)] = root(node)
    regions: dict[Node, dict[Node, None]] = defaultdict(dict)
    for node in parent:
        regions[root(node)][node] = None
    return [region for region in regions.values() if any(is_call(node, aten.linear) for node in region)]


def _members(rewrite: Rewrite) -> list[Node]:
    """What may be flattened, in order. A Linear without a bias saves nothing, so that it is left out at the
    end of a region: what it reads leaves the region once, for all such Linears.
    """
    members: dict[Node, None] = {}
    for node in reversed(rewrite.graph.nodes):
        plain = is_call(node, aten.linear) and argument(node, "bias") is None
        if _is_member(rewrite, node) and not (plain and members.keys().isdisjoint(node.users)):
            members[node] = None
    return list(members)[::-1]


def _is_member(rewrite: Rewrite, node: Node) -> bool:
    if node.op != "call_function" or not hasattr(rewrite.held(node)[0], "shape"):
        return False
    shape = rewrite.shape(node)
    if _keeps_channels(rewrite, node):
        return True
    if len(shape) < 3 or rewrite.batched(node) is None or rewrite.batched(node) == len(shape) - 1:
        return False
    if is_call(node, aten.linear):
        return rewrite.constant(argument(node, "weight")) is not None
    if is_call(node, aten.layer_norm):
        return len(argument(node, "normalized_shape")) == 1
    if is_elementwise(node):
        return True
    if is_call(node, aten.add, aten.mul, aten.sub):
        return all(_is_operand(rewrite, operand, shape) for operand in node.args[:2])
    return False


def _keeps_channels(rewrite: Rewrite, node: Node) -> bool:
    """Whether a reshape only counts the tokens otherwise."""
    if not is_call(node, *RESHAPES):
        return False
    ends: tuple[Any, Node] = (node.args[0], node)
    return all(
        len(rewrite.shape(value)) > 1
        and rewrite.batched(value) == 0
        and rewrite.shape(value)[-1] == rewrite.shape(node)[-1]
        for value in ends
    )


def _in_step(rewrite: Rewrite, source: Node, node: Node) -> bool:
    return _keeps_channels(rewrite, node) or rewrite.shape(source)[:-1] == rewrite.shape(node)[:-1]


def _enters_freely(rewrite: Rewrite, source: Node) -> bool:
    return is_call(source, *RESHAPES) or len(rewrite.shape(source)) == 2


def _is_operand(rewrite: Rewrite, operand: object, shape: tuple[int, ...]) -> bool:
    """A value of the same shape, a number, or a constant along the channels alone."""
    if not isinstance(operand, Node):
        return isinstance(operand, (int, float))
    constant = rewrite.constant(operand)
    if constant is not None:
        return constant.numel() == 1 or (constant.numel() == shape[-1] == constant.shape[-1])
    return hasattr(rewrite.held(operand)[0], "shape") and rewrite.shape(operand) == shape


def _entries(rewrite: Rewrite, region: dict[Node, None]) -> list[Node]:
    """The values from outside that the region reads, constants left out."""
    sources = {source for node in region for source in node.all_input_nodes}
    return [source for source in sources if source not in region and rewrite.constant(source) is None]


def _leaves_freely(node: Node, region: dict[Node, None]) -> bool:
    return all(user in region or is_call(user, *RESHAPES) for user in node.users)


def _flatten(rewrite: Rewrite, region: dict[Node, None]) -> None:
    flat: dict[Node, Node] = {}
    for node in region:
        rewrite.at(node)
        args: list[Any] = []
        for given in node.args:
            if isinstance(given, Node) and given not in flat and len(rewrite.shape(given)) == 2:
                flat[given] = given
            elif isinstance(given, Node) and given not in flat and rewrite.constant(given) is None:
                flat[given] = rewrite.call(aten.reshape.default, given, [-1, rewrite.shape(given)[-1]])
            elif (
                isinstance(given, Node)
                and (constant := rewrite.constant(given)) is not None
                and constant.ndim > 1
                and not is_call(node, aten.linear)
            ):
                args.append(rewrite.put(constant.reshape(-1), like=given))
                continue
            args.append(flat.get(given, given) if isinstance(given, Node) else given)
        flat[node] = args[0] if is_call(node, *RESHAPES) else rewrite.call(node.target, *args, **node.kwargs)
    for node in region:
        readers = [user for user in node.users if user not in region]
        if readers:
            shape = [
                -1 if axis == rewrite.batched(node) else edge for axis, edge in enumerate(rewrite.shape(node))
            ]
            rewrite.at(node)
            whole = rewrite.call(aten.reshape.default, flat[node], shape)
            for reader in readers:
                reader.replace_input_with(node, whole)
