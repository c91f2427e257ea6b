"""Compose two linear maps in a row where the one map costs no more than both.

    W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)          behind one tap, at each tap of the kernel W2

Convolutions and Linears, also with transposes and reshapes between that keep the channels; if one of the two
has a single tap, they may see their places in different orders. A site is taken if the composed map has no
more weights and no more multiply-adds, by shapes. Exact up to rounding, 1e-16 a term, in float64. Refused,
with the reason: a larger map, zero padding of the second where the first gives a bias or values of a border,
a first that is read elsewhere, weights used twice. What was composed may be a branch of a sum, so that sums
are merged again behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TypeVar

from torch.fx import Node

from vmkd_fx.passes.fold.between import axis_before, layouts_before, written_on
from vmkd_fx.passes.fold.linear_map import Form, LinearMap, compose_maps, composed_form
from vmkd_fx.passes.fold.map_nodes import MapNode, looks_like_a_map, map_of, write_map
from vmkd_fx.passes.fold.parallel import merge_parallel
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite

Shaped = TypeVar("Shaped", Form, LinearMap)


def compose_serial(rewrite: Rewrite) -> None:
    """Compose, and merge the sums that this makes possible, until nothing more composes."""
    while _compose_once(rewrite):
        rewrite.graph.eliminate_dead_code()
        merge_parallel(rewrite)


SERIAL = LoweringPass(
    "serial",
    compose_serial,
    {
        "constants": "it reads weights that are computed from parameters",
        "channel_affine": "a BatchNorm between two convolutions hides one from the other",
        "parallel": "a sum of branches is one map only once they are merged",
    },
)


@dataclass(frozen=True)
class Pair:
    """Two maps in a row.

    Attributes:
        first, second: the maps.
        way: the layout operators between them, first to last.
        form: of both as one.
        at_first: whether that one stands before the layouts, and not behind them.
    """

    first: MapNode
    second: MapNode
    way: list[Node]
    form: Form
    at_first: bool


def _compose_once(rewrite: Rewrite) -> int:
    count = 0
    for node in list(rewrite.graph.nodes):
        if not looks_like_a_map(node):
            continue
        way, source = layouts_before(node)
        if not looks_like_a_map(source):
            continue
        found = _pair(rewrite, node, way, source)
        if isinstance(found, str):
            rewrite.refuse(node, found)
        elif rewrite.take(node, "into one from two in a row"):
            rewrite.replace(node, _written(rewrite, found))
            count += 1
    return count


def _pair(rewrite: Rewrite, node: Node, way: list[Node], source: Node) -> Pair | str:
    """Both maps and the form of one in their place, or why they stay."""
    for inner in (source, *way):
        if len(inner.users) > 1:
            return f"{inner.name} before it is read by other nodes too"
    second, first = map_of(rewrite, node), map_of(rewrite, source)
    if isinstance(second, str) or isinstance(first, str):
        return next(reason for reason in (second, first) if isinstance(reason, str))
    if axis_before(rewrite, way, second.channel_axis) != first.channel_axis:
        return f"the channels of {source.name} before it are on another axis"
    at_first = not first.form.pointwise
    if at_first and way and not second.form.pointwise:
        return f"{source.name} before it sees the places in another layout"
    axes = len(first.form.kernel if at_first else second.form.kernel)
    form = composed_form(_over(second.form, axes), _over(first.form, axes), first.has_bias)
    if isinstance(form, str):
        return f"{source.name} before it: {form}"
    reason = _dearer(rewrite, first, second, form)
    return reason or Pair(first, second, way, form, at_first)


def _dearer(rewrite: Rewrite, first: MapNode, second: MapNode, form: Form) -> str | None:
    """What would grow; None if nothing does."""
    places = [prod(rewrite.shape(each.node)) // each.form.outputs for each in (first, second)]
    apart = first.weights * places[0] + second.weights * places[1]
    together = form.weights * places[1]
    if together > apart:
        return (
            f"one map with {first.node.name} would take {together // 2} multiply-adds instead of {apart // 2}"
        )
    had = first.weights + second.weights + first.form.outputs * first.has_bias
    needs = form.weights + form.outputs * (first.has_bias and not second.has_bias)
    if needs > had:
        return f"one map with {first.node.name} would have {needs} weights instead of {had}"
    return None


def _written(rewrite: Rewrite, pair: Pair) -> Node:
    axes = len(pair.form.kernel)
    second, first = (each.read(rewrite) for each in (pair.second, pair.first))
    made = compose_maps(_over(second, axes), _over(first, axes), pair.form)
    like = pair.first if pair.at_first else pair.second
    axis = pair.second.channel_axis
    if pair.at_first:
        result = write_map(rewrite, made, pair.first.source, like)
        return written_on(rewrite, pair.way, result, axis, pair.form.outputs)
    source = written_on(rewrite, pair.way, pair.first.source, axis, pair.form.inputs)
    return write_map(rewrite, made, source, like)


def _over(found: Shaped, axes: int) -> Shaped:
    """A form or a map over this many place axes; one with another number of them has a single tap."""
    form = found if isinstance(found, Form) else found.form
    return found if len(form.kernel) == axes else found.with_axes(axes)
