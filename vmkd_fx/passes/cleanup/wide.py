"""A permutation of more axes than engines have, as one gather of places.

    reshape to (B, 2, 2, 2, 2, 2, 2, 2, 2, C), permute the twos, reshape     =     x[:, places]

TensorRT's tensors have at most eight axes. The axes that move are one axis of fixed length together, so where
each number comes from is a list of constants.
"""

from __future__ import annotations

from math import prod

import torch
from torch.fx import Node

from vmkd_fx.passes.cleanup.axes import Movement
from vmkd_fx.passes.rewrite import Rewrite

aten = torch.ops.aten

MOST_AXES = 8


def is_wide(found: Movement) -> bool:
    """Whether a step of it has more axes than an engine's tensor."""
    return max(len(step or ()) for step in (found.into, found.order, found.out_of)) > MOST_AXES


def moved_axes(found: Movement) -> tuple[int, int] | None:
    """The first and the last axis that the permutation moves; None where the batch is among them."""
    if found.into is None or found.order is None:
        return None
    moved = [place for place, axis in enumerate(found.order) if place != axis]
    first, last = moved[0], moved[-1]
    return None if -1 in found.into[first : last + 1] else (first, last)


def gather(rewrite: Rewrite, source: Node, found: Movement) -> Node:
    """What `found` makes of `source`, by a gather; `moved_axes` has them."""
    ends = moved_axes(found)
    assert ends is not None and found.into is not None and found.order is not None
    first, last = ends
    edges = found.into[first : last + 1]
    order = [axis - first for axis in found.order[first : last + 1]]
    places = torch.arange(prod(edges)).reshape(edges).permute(order).flatten()
    flat = [*found.into[:first], len(places), *found.into[last + 1 :]]
    value = rewrite.call(aten.reshape.default, source, flat)
    value = rewrite.call(aten.index_select.default, value, first, rewrite.put(places))
    after = found.out_of or tuple(found.into[axis] for axis in found.order)
    return rewrite.call(aten.reshape.default, value, list(after))
