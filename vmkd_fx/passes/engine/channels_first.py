"""Lay channels first or last so that the fewest numbers are moved.

    permute(W permute(x) + b) = conv1x1(x; W, b)          x (B, C, H, W), W on the last of (B, H, W, C)

A Linear is a convolution of one tap where channels come first; activations, sums, products and averages over
places have either layout. What computes in which layout is a minimum cut: every value that is made in one
layout and read in the other costs its size. Where both cost the same a Linear with a bias becomes a
convolution, which adds it for nothing, and everything else stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.engine.elementwise import is_elementwise
from vmkd_fx.passes.engine.layout_cut import channels_first_at_least_cost
from vmkd_fx.passes.fold.moves import PERMUTES, permutation
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument, is_call

aten = torch.ops.aten

TO_FIRST, TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def lay_channels_first(rewrite: Rewrite) -> None:
    """Compute with channels first where that moves less."""
    if rewrite.target.kind == "torch":
        return
    members = {node: None for node in rewrite.graph.nodes if _is_member(rewrite, node)}
    turned = {node: order for node in rewrite.calls(*PERMUTES) if (order := _turn(rewrite, node))}
    if not turned or not members:
        return
    readers = {node: _layout_readers(rewrite, node) for node in rewrite.graph.nodes if _is_map(rewrite, node)}
    sizes = {node: torch.Size(rewrite.shape(node)).numel() for node in readers}
    to_first, to_last = (
        frozenset(node for node in turned if turned[node] == way) for way in (TO_FIRST, TO_LAST)
    )
    biased = frozenset(
        node for node in members if is_call(node, aten.linear) and argument(node, "bias") is not None
    )
    first = channels_first_at_least_cost(readers, sizes, frozenset(members), to_first, to_last, biased)
    for region in _regions(rewrite, [node for node in members if node in first]):
        if rewrite.take(next(iter(region)), "regions with channels first"):
            _Turning(rewrite, region).write()


CHANNELS_FIRST = LoweringPass(
    "channels_first", lay_channels_first, {"views": "it reads permutations of maps one by one"}
)


def _turn(rewrite: Rewrite, node: Node) -> list[int] | None:
    if len(rewrite.shape(node)) != 4 or rewrite.batched(node) != 0:
        return None
    order = permutation(node, 4)
    return order if order in (TO_FIRST, TO_LAST) else None


def _is_map(rewrite: Rewrite, node: Node) -> bool:
    if node.op not in ("call_function", "placeholder") or not hasattr(rewrite.held(node)[0], "shape"):
        return False
    return len(rewrite.shape(node)) == 4 and rewrite.batched(node) == 0


def _is_member(rewrite: Rewrite, node: Node) -> bool:
    """Whether the node can compute in either layout."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    if is_call(node, aten.mean.dim):
        axes = [axis % 4 for axis in argument(node, "dim", ())]
        return _is_map(rewrite, node.args[0]) and sorted(axes) == [1, 2] and _is_plain(node)
    if not _is_map(rewrite, node):
        return False
    if is_call(node, aten.linear):
        weight, bias = argument(node, "weight"), argument(node, "bias")
        return all(
            rewrite.constant(held) is not None and rewrite.readers(held) == 1
            for held in (weight, *([] if bias is None else [bias]))
        )
    if is_elementwise(node):
        return True
    if is_call(node, aten.add, aten.sub, aten.mul):
        return all(
            isinstance(given, (int, float)) or _is_operand(rewrite, given) for given in node.args[:2]
        ) and any(rewrite.shape(source) == rewrite.shape(node) for source in node.all_input_nodes)
    return False


def _is_plain(mean: Node) -> bool:
    return not argument(mean, "keepdim") and argument(mean, "dtype") is None


def _is_operand(rewrite: Rewrite, given: Any) -> bool:
    return isinstance(given, Node) and (rewrite.constant(given) is not None or _is_map(rewrite, given))


def _layout_readers(rewrite: Rewrite, node: Node) -> list[Node]:
    """Who reads the whole of a value; one number a channel is turned for nothing."""
    return [
        user
        for user in node.users
        if not (_is_member(rewrite, user) and _is_map(rewrite, user) and _broadcasts(rewrite, node, user))
    ]


def _broadcasts(rewrite: Rewrite, operand: Node, node: Node) -> bool:
    return not is_call(node, aten.linear) and rewrite.shape(operand) != rewrite.shape(node)


def _regions(rewrite: Rewrite, members: list[Node]) -> list[dict[Node, None]]:
    """Members that read one another, in order."""
    parent = {node: node for node in members}

    def root(node: Node) -> Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in members:
        for source in node.all_input_nodes:
            if source in parent:
                parent[root(source)] = root(node)
    regions: dict[Node, dict[Node, None]] = {}
    for node in members:
        regions.setdefault(root(node), {})[node] = None
    return list(regions.values())


class _Turning:
    """One region on its way to channels first."""

    def __init__(self, rewrite: Rewrite, region: dict[Node, None]) -> None:
        self.rewrite, self.region = rewrite, region
        self.made: dict[Node, Node] = {}

    def write(self) -> None:
        for node in self.region:
            self.rewrite.at(node)
            self.made[node] = self._anew(node)
        for node in self.region:
            self._hand_out(node)

    def _anew(self, node: Node) -> Node:
        rewrite = self.rewrite
        if is_call(node, aten.mean):
            return rewrite.call(aten.mean.dim, self._operand(node.args[0], node), [2, 3])
        if is_call(node, aten.linear):
            weight, bias = argument(node, "weight"), argument(node, "bias")
            matrix = rewrite.constant(weight)
            assert matrix is not None
            kernel = rewrite.put(matrix[:, :, None, None], like=weight)
            return rewrite.call(aten.conv2d.default, self._operand(node.args[0], node), kernel, bias)
        args = [self._operand(given, node) if isinstance(given, Node) else given for given in node.args]
        return rewrite.call(node.target, *args, **node.kwargs)

    def _operand(self, given: Any, node: Node) -> Node:
        """What a member reads, with channels first."""
        if given in self.made:
            return self.made[given]
        rewrite = self.rewrite
        constant = rewrite.constant(given)
        if constant is not None:
            if constant.numel() == 1:
                return given
            whole = constant.reshape((1,) * (4 - constant.ndim) + tuple(constant.shape))
            return rewrite.put(whole.permute(TO_FIRST), like=given)
        shape = rewrite.shape(given)
        if shape[1:3] == (1, 1):
            return rewrite.call(aten.reshape.default, given, [-1, shape[3], 1, 1])
        if is_call(given, *PERMUTES) and _turn(rewrite, given) == TO_LAST:
            return given.args[0]
        rewrite.at(given.next)  # whoever turns the value already reads it from here
        turned = rewrite.call(aten.permute.default, given, TO_FIRST)
        rewrite.at(node)
        for user in list(given.users):
            if user is not turned and is_call(user, *PERMUTES) and _turn(rewrite, user) == TO_FIRST:
                user.replace_all_uses_with(turned)
        self.made[given] = turned
        return turned

    def _hand_out(self, node: Node) -> None:
        """Give those outside the region what they read."""
        made, rewrite = self.made[node], self.rewrite
        if is_call(node, aten.mean):
            node.replace_all_uses_with(made)
            return
        outside = [user for user in node.users if user not in self.region]
        back = None
        for user in outside:
            if is_call(user, *PERMUTES) and _turn(rewrite, user) == TO_FIRST:
                user.replace_all_uses_with(made)
                continue
            if back is None:
                rewrite.at(made.next)
                back = rewrite.call(aten.permute.default, made, TO_LAST)
            user.replace_input_with(node, back)
