"""Shift channels by one depthwise convolution instead of paddings, cuts and a join.

    cat_k(pad(x)[window k, channels k]) = P (one tap a channel * x)        zero outside the map

CycleMLP's Cycle FC (Chen et al., 2022), S2-MLP and shifted windows of channels are spelled this way: every
channel is read from another place nearby. Which channel and which place is read off the graph: numbers that
name the places of the input go through its paddings, cuts and joins. The order P that the join leaves the
channels in goes into the Linears behind. Exact: each sum has one term that is not zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from vmkd_fx.passes.fold.holders import Holder, holder_of, rewritten
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument, is_call

aten = torch.ops.aten


@dataclass(frozen=True)
class _Shift:
    """A join that is a shift of `source`.

    Attributes:
        source: (B, C, H, W), or (B, H, W, C) if its channels are `last`.
        order: which channel of the source each channel of the join is.
        steps: by how much each channel of the source is moved along height and width, (C, 2).
        readers: the Linears behind; empty if they need not know of the order.
    """

    source: Node
    last: bool
    order: torch.Tensor
    steps: torch.Tensor
    readers: tuple[Holder, ...]


def convolve_shifts(rewrite: Rewrite) -> None:
    """Rewrite every join of shifted channels of one map."""
    if rewrite.target.kind == "torch":
        return
    for node in rewrite.calls(aten.cat):
        found = _shift(rewrite, node)
        if isinstance(found, str):
            rewrite.refuse(node, found)
        elif found is not None and rewrite.take(node, "shifts of channels as convolutions"):
            _write(rewrite, node, found)


SHIFTS = LoweringPass(
    "shifts", convolve_shifts, {"constants": "the weights behind it may be computed from parameters"}
)


def _shift(rewrite: Rewrite, node: Node) -> _Shift | str | None:
    """What `node` shifts; None if it does not look like it, a reason if it has to stay."""
    source, way = _source(node)
    if source is None or rewrite.constant(source) is not None or not _is_map(rewrite, source):
        return None
    axis = argument(node, "dim", 0) % 4
    if axis not in (1, 3) or rewrite.shape(source) != rewrite.shape(node):
        return None
    last = axis == 3
    arrived = _arrived(rewrite, source, way)
    read = _read(arrived.movedim(-1, 1) if last else arrived)
    if read is None:
        return f"it does more than to shift channels of {source}"
    order, steps = read
    if not bool(steps.any()):
        return None
    readers: list[Holder] = []
    if not torch.equal(order, torch.arange(len(order))):
        for user in node.users:
            holder = holder_of(rewrite, user)
            if isinstance(holder, str) or holder.kind != "linear" or not last or user.args[0] is not node:
                return f"its channels are in another order, which {user} cannot take"
            readers.append(holder)
    return _Shift(source, last, order, steps, tuple(readers))


def _source(node: Node) -> tuple[Node | None, list[Node]]:
    """What all items of a join are cut from, and the nodes between, in order."""
    between: dict[Node, None] = {node: None}
    found: set[Node] = set()
    for item in argument(node, "tensors"):
        cut = False
        while is_call(item, aten.slice) or (is_call(item, aten.pad) and _pads_with_zeros(item)):
            cut = cut or is_call(item, aten.slice)
            between[item] = None
            item = item.args[0]
        if not cut:
            return None, []
        found.add(item)
    way = [each for each in node.graph.nodes if each in between]
    return (found.pop() if len(found) == 1 else None), way


def _pads_with_zeros(node: Node) -> bool:
    return argument(node, "mode") == "constant" and not argument(node, "value")


def _is_map(rewrite: Rewrite, node: Node) -> bool:
    return len(rewrite.shape(node)) == 4 and rewrite.batched(node) == 0


def _arrived(rewrite: Rewrite, source: Node, way: list[Node]) -> torch.Tensor:
    """Where each number of the last node's value comes from, counted from one; 0 for the padding."""
    shape = rewrite.shape(source)
    places: dict[Node, Any] = {source: torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape)}
    for step in way:
        given: Any = map_arg((step.args, step.kwargs), places.__getitem__)
        places[step] = step.target(*given[0], **given[1])  # type: ignore[operator]
    found: torch.Tensor = places[way[-1]]
    if argument(way[-1], "dim", 0) % 4 == 3:  # numbers are to count maps of channels first
        numbers = torch.zeros(found.numel() + 1, dtype=torch.long)
        numbers[places[source].movedim(-1, 1).flatten()] = torch.arange(1, found.numel() + 1)
        found = numbers[found]
    return found


def _read(arrived: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """From the places (B, C, H, W): the source's channel of each, and the steps of each of these; None if
    they are no shift.
    """
    _, channels, height, width = arrived.shape
    place = arrived[0].flatten(1) - 1
    here = place.max(1)  # a number that is not of the padding
    row, column = here.indices // width, here.indices % width
    order = here.values // (height * width)
    from_row, from_column = here.values % (height * width) // width, here.values % width
    order_of = torch.sort(order)
    if not torch.equal(order_of.values, torch.arange(channels)):
        return None
    steps = torch.stack([from_row - row, from_column - column], 1)
    source = torch.arange(1, arrived.numel() + 1).reshape(arrived.shape)
    reach = int(steps.abs().max())
    padded = torch.nn.functional.pad(source, (reach,) * 4)
    for channel in range(channels):
        down, right = (int(step) + reach for step in steps[channel])
        window = padded[:, order[channel], down : down + height, right : right + width]
        if not torch.equal(window, arrived[:, channel]):
            return None
    return order, steps[order_of.indices]


def _write(rewrite: Rewrite, node: Node, found: _Shift) -> None:
    channels = len(found.order)
    high, wide = (int(found.steps[:, axis].abs().max()) for axis in (0, 1))
    kernel = torch.zeros(channels, 1, 2 * high + 1, 2 * wide + 1, dtype=rewrite.held(node)[0].dtype)
    kernel[torch.arange(channels), 0, found.steps[:, 0] + high, found.steps[:, 1] + wide] = 1
    value: Any = found.source
    if found.last:
        value = rewrite.call(aten.permute.default, value, [0, 3, 1, 2])
    taps = rewrite.put(kernel)
    value = rewrite.call(aten.conv2d.default, value, taps, None, [1, 1], [high, wide], [1, 1], channels)
    if found.last:
        value = rewrite.call(aten.permute.default, value, [0, 2, 3, 1])
    for holder in found.readers:
        _reorder(rewrite, holder, value, found.order)
    if not found.readers:
        rewrite.replace(node, value)


def _reorder(rewrite: Rewrite, holder: Holder, source: Node, order: torch.Tensor) -> None:
    """The Linear on channels in the source's order."""
    weight, bias = rewrite.constant(holder.weight), rewrite.constant(holder.bias)
    assert weight is not None
    columns = torch.empty_like(weight)
    columns[:, order] = weight
    rewrite.at(holder.node)
    rewrite.replace(holder.node, rewritten(rewrite, holder, source, columns, bias))
