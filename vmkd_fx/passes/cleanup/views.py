"""Write every chain of reshapes and permutations in the fewest steps, with constants and one -1 a reshape.

A size that was computed while the model ran, `x.shape[0]` or `H // 7`, is a number here or the batch; so the
graph needs no arithmetic on shapes, and an engine builds without layers for it. What moves nothing goes:
slices of everything, paddings by nothing, expansions to the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from vmkd_fx.passes.cleanup.axes import Layout, Length, Movement, movement, permuted, reshaped, source_layout
from vmkd_fx.passes.cleanup.wide import gather, is_wide, moved_axes
from vmkd_fx.passes.fold.moves import PERMUTES, RESHAPES, permutation
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument, is_call

aten = torch.ops.aten


def simplify_views(rewrite: Rewrite) -> None:
    """Drop what does nothing, then write each chain anew where that is shorter or free of computed sizes."""
    for node in rewrite.calls(aten.slice, aten.pad, aten.expand, *RESHAPES):
        source = node.args[0]
        if (
            isinstance(source, Node)
            and _does_nothing(rewrite, node, source)
            and rewrite.take(node, "without effect")
        ):
            rewrite.replace(node, source)
    for node in [node for node in rewrite.calls(*RESHAPES, *PERMUTES) if _is_needed(node)]:
        _write(rewrite, node, _chain(node))


VIEWS = LoweringPass("views", simplify_views, {"split_heads": "it reads heads as the model cuts them"})
LAST_VIEWS = LoweringPass("last_views", simplify_views)
"""Once more, for what other passes have put there."""


def is_view(node: object) -> bool:
    """Whether a node moves its one operand's numbers without changing them."""
    return is_call(node, *RESHAPES, *PERMUTES)


def _does_nothing(rewrite: Rewrite, node: Node, source: Node) -> bool:
    same = all(
        one.shape == other.shape for one, other in zip(rewrite.held(node), rewrite.held(source), strict=True)
    )
    return same and not (is_call(node, aten.pad) and any(argument(node, "pad")))


def _is_needed(node: Node) -> bool:
    """Whether somebody reads the value itself, or several chains go on from it."""
    return len(node.users) > 1 or not all(is_view(user) for user in node.users)


def _chain(node: Node) -> list[Node]:
    """The views from the first one up to `node`."""
    chain = [node]
    while is_view(chain[0].args[0]):
        chain.insert(0, chain[0].args[0])  # type: ignore[arg-type]
    return chain


def _write(rewrite: Rewrite, node: Node, chain: Sequence[Node]) -> None:
    options = []
    for start, view in enumerate(chain):
        source = view.args[0]
        assert isinstance(source, Node)
        if start and not _is_needed(source):
            continue
        found = _movement(rewrite, source, chain[start:])
        if found is not None and (not is_wide(found) or moved_axes(found) is not None):
            options.append((len(found), source, found))
    if options:
        _, source, best = min(options, key=lambda option: option[0])
        _move(rewrite, node, source, best)
        return
    for view in chain:
        _move(rewrite, view, view.args[0], _as_it_is(rewrite, view))  # type: ignore[arg-type]


def _move(rewrite: Rewrite, node: Node, source: Node, best: Movement) -> None:
    if _is_written(node, source, best) or not rewrite.take(node, "chains of views"):
        return
    if is_wide(best):
        rewrite.replace(node, gather(rewrite, source, best))
        return
    value = source
    if best.into is not None:
        value = rewrite.call(aten.reshape.default, value, list(best.into))
    if best.order is not None:
        value = rewrite.call(aten.permute.default, value, list(best.order))
    if best.out_of is not None:
        value = rewrite.call(aten.reshape.default, value, list(best.out_of))
    rewrite.replace(node, value)


def _movement(rewrite: Rewrite, source: Node, views: Sequence[Node]) -> Movement | None:
    """From `source` through `views` in one; None where lengths do not divide."""
    lengths = _lengths(rewrite, source)
    layout: Layout = source_layout(lengths)
    for view in views:
        if is_call(view, *PERMUTES):
            layout = permuted(layout, permutation(view, len(layout)))
            continue
        found = reshaped(layout, _lengths(rewrite, view))
        if found is None:
            return None
        layout = found[0]
    return movement(lengths, layout, _lengths(rewrite, views[-1]))


def _as_it_is(rewrite: Rewrite, node: Node) -> Movement:
    """The one step that `node` is, in numbers."""
    if is_call(node, *PERMUTES):
        return Movement(None, tuple(permutation(node, len(rewrite.shape(node)))), None)
    return Movement(
        None, None, tuple(-1 if batched else number for number, batched in _lengths(rewrite, node))
    )


def _lengths(rewrite: Rewrite, node: Node) -> list[Length]:
    """For each axis how often it holds the batch, or its length."""
    two, three = (held.shape for held in rewrite.held(node))
    return [
        (one, False) if one == other else (other - one, True) for one, other in zip(two, three, strict=True)
    ]


def _is_written(node: Node, source: Node, best: Movement) -> bool:
    """Whether the graph has it in this form already."""
    steps: list[tuple[object, list[int]]] = []
    while node is not source:
        if len(node.args) != 2 or not isinstance(node.args[1], (list, tuple)):
            return False
        steps.insert(0, (node.target, list(node.args[1])))
        node = node.args[0]  # type: ignore[assignment]
    wanted = (
        (aten.reshape.default, best.into),
        (aten.permute.default, best.order),
        (aten.reshape.default, best.out_of),
    )
    return steps == [(operator, list(step)) for operator, step in wanted if step is not None]
