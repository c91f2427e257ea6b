"""Roll tokens by one gather instead of a cut and a join for every axis.

roll(x, shifts) [.., i, ..] = x[.., (i - shift) mod n, ..]        on all rolled axes at once, as one list of
places
"""

from __future__ import annotations

import torch

from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument

aten = torch.ops.aten


def gather_rolls(rewrite: Rewrite) -> None:
    """Replace `roll` along neighbouring axes of fixed length."""
    for node in rewrite.calls(aten.roll):
        source, shape = node.args[0], rewrite.shape(node)
        axes = [axis % len(shape) for axis in argument(node, "dims", [])]
        first, count = min(axes, default=0), len(axes)
        if not axes or sorted(axes) != list(range(first, first + count)) or rewrite.batched(node) in axes:
            rewrite.refuse(node, "its axes are not neighbours of fixed length")
            continue
        if not rewrite.take(node, "rolls as gathers"):
            continue
        edges = list(shape[first : first + count])
        places = torch.arange(torch.Size(edges).numel()).reshape(edges)
        places = places.roll(argument(node, "shifts"), [axis - first for axis in axes]).flatten()
        flat, whole = list(shape), list(shape)
        if (batched := rewrite.batched(node)) is not None:
            flat[batched] = whole[batched] = -1
        flat[first : first + count] = [len(places)]
        value = rewrite.call(aten.reshape.default, source, flat)
        value = rewrite.call(aten.index_select.default, value, first, rewrite.put(places))
        rewrite.replace(node, rewrite.call(aten.reshape.default, value, whole))


ROLLS = LoweringPass("rolls", gather_rolls)
