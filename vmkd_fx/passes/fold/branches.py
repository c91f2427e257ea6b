"""Which terms of a sum become one linear map, decided by shapes alone.

Terms belong together if they read one input. They merge where the one kernel, as large as the largest and
in as few groups as the densest, has no more weights than they have apart: a 1x1 beside a 3x3 goes into its
middle, but a depthwise 3x3 beside a dense 1x1 stays, for together they would be a dense 3x3. A scale of the
input itself is an identity with these weights on its diagonal, and costs nothing; an average likewise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from vmkd_fx.passes.fold.affine import long_axes
from vmkd_fx.passes.fold.linear_map import Form, sum_form
from vmkd_fx.passes.fold.map_nodes import MapNode, looks_like_a_map, map_of
from vmkd_fx.passes.fold.sums import Sum, Term
from vmkd_fx.passes.rewrite import Rewrite


@dataclass(frozen=True, eq=False)
class Branch:
    """A term that is a linear map of `source`; without `node` it is `source` itself, scaled."""

    source: Node
    form: Form
    scale: torch.Tensor
    node: MapNode | None = None

    @property
    def weights(self) -> int:
        return 0 if self.node is None else self.node.weights


@dataclass(eq=False)
class Merged:
    """Branches that become one, and the form of that one."""

    branches: list[Branch]
    form: Form

    @property
    def weights(self) -> int:
        return self.form.weights if any(branch.weights for branch in self.branches) else 0

    @property
    def largest(self) -> MapNode:
        """The map with the most weights."""
        nodes = [branch.node for branch in self.branches if branch.node is not None]
        return max(nodes, key=lambda node: node.weights)


@dataclass
class Plan:
    """What a sum becomes: merged maps, and terms that stay; with the reasons why no more merge."""

    merged: list[Merged] = field(default_factory=list)
    rest: list[Term] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def plan(rewrite: Rewrite, whole: Sum, shape: tuple[int, ...]) -> Plan:
    """Which terms of `whole`, a value of this shape, become one map."""
    made = Plan()
    branches: list[Branch] = []
    for term in whole.terms:
        found = _branch(rewrite, term, shape)
        if isinstance(found, str):
            made.reasons.append(found)
        if isinstance(found, Branch):
            branches.append(found)
        else:
            made.rest.append(term)
    for source in dict.fromkeys(branch.source for branch in branches):
        together = [branch for branch in branches if branch.source is source]
        together += _scaled_input(rewrite, made.rest, source, shape, together[0])
        together.sort(key=lambda branch: -branch.weights)
        _merge(rewrite, together, made)
    _explain(made)
    return made


def _branch(rewrite: Rewrite, term: Term, shape: tuple[int, ...]) -> Branch | str | None:
    """The linear map that a term is; None or, if it looks like one, the reason where it is none."""
    found = map_of(rewrite, term.node)
    if isinstance(found, str):
        return found if looks_like_a_map(term.node) else None
    name = term.node.name
    if not term.own:
        return f"{name} is read by other nodes too"
    if rewrite.shape(term.node) != shape:
        return f"{name} is smaller than the sum"
    if not long_axes(term.scale) <= {found.channel_axis}:
        return f"{name} is scaled along another axis than its channels"
    return Branch(found.source, found.form, term.scale, found)


def _scaled_input(
    rewrite: Rewrite, rest: list[Term], source: Node, shape: tuple[int, ...], like: Branch
) -> list[Branch]:
    """The terms that are `source` itself as branches, if it is as large as the sum; they leave `rest`."""
    assert like.node is not None
    if rewrite.shape(source) != shape:
        return []
    axis = like.node.channel_axis
    form = Form(shape[axis], shape[axis], groups=shape[axis]).with_axes(len(like.form.kernel))
    taken = [term for term in rest if term.node is source and long_axes(term.scale) <= {axis}]
    rest[:] = [term for term in rest if term not in taken]
    return [Branch(source, form, term.scale) for term in taken]


def _merge(rewrite: Rewrite, branches: list[Branch], made: Plan) -> None:
    """Put each branch into the first map that it costs nothing to join; the heaviest come first."""
    maps: list[Merged] = []
    for branch in branches:
        for merged in maps:
            form = _joined(rewrite, merged, branch)
            if isinstance(form, Form):
                merged.branches.append(branch)
                merged.form = form
                break
            if branch.node is not None and merged.weights:
                made.reasons.append(f"{merged.largest.node.name} and {branch.node.node.name}: {form}")
        else:
            maps.append(Merged([branch], branch.form))
    made.merged += [merged for merged in maps if merged.weights]
    for branch in (branch for merged in maps if not merged.weights for branch in merged.branches):
        node = branch.source if branch.node is None else branch.node.node
        made.rest.append(Term(node, branch.scale, branch.node is not None))


def _joined(rewrite: Rewrite, merged: Merged, branch: Branch) -> Form | str:
    form = sum_form(merged.form, branch.form)
    if isinstance(form, str):
        return form
    if form.kernel:
        places, axes = rewrite.shape(branch.source), len(form.kernel)
        if form.size(places[-axes:]) != merged.form.size(places[-axes:]):
            return "their borders differ, and one map would give more places"
    apart = merged.weights + branch.weights
    if form.weights > apart:
        return f"one map of both would have {form.weights} weights instead of {apart}"
    return form


def _explain(made: Plan) -> None:
    """Sums of maps of different inputs stay, which nobody would look for without a reason."""
    sources = dict.fromkeys(branch.source for merged in made.merged for branch in merged.branches)
    if len(sources) > 1 and not made.reasons:
        made.reasons.append(f"its terms read different inputs: {', '.join(node.name for node in sources)}")
