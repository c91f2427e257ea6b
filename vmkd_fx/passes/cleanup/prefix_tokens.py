"""Put constant tokens in front without asking for the length of the batch.

    cat(expand(c, B), x) + p  =  pad(x) + (pad'(c) + p)

A class token is expanded to the batch, which needs arithmetic on shapes in every runtime. Zeros in its place
need none, and the token itself is part of a constant that is added, most often the position embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument, is_call

aten = torch.ops.aten


def add_prefix_tokens(rewrite: Rewrite) -> None:
    """Replace concatenations of expanded constants with one value that depends on the images."""
    for node in rewrite.calls(aten.cat):
        items: list[Any] = argument(node, "tensors")
        axis = argument(node, "dim", 0) % len(rewrite.shape(node))
        constants = [_expanded_constant(rewrite, item) for item in items]
        if constants.count(None) != 1 or len(items) == 1:
            continue
        place = constants.index(None)
        if rewrite.batched(items[place]) == axis:
            rewrite.refuse(node, "it joins along the batch")
            continue
        if rewrite.take(node, "constants put in front or behind"):
            _pad_and_add(rewrite, node, axis, items[place], constants[:place], constants[place + 1 :])


PREFIX_TOKENS = LoweringPass("prefix_tokens", add_prefix_tokens)


def _pad_and_add(
    rewrite: Rewrite, node: Node, axis: int, source: Node, front: list[Any], behind: list[Any]
) -> None:
    shape = [1 if place == rewrite.batched(node) else edge for place, edge in enumerate(rewrite.shape(node))]
    front, behind = (
        [part.reshape((1,) * (len(shape) - part.ndim) + tuple(part.shape)) for part in parts]
        for parts in (front, behind)
    )
    between = list(shape)
    before, after = (sum(part.shape[axis] for part in parts) for parts in (front, behind))
    between[axis] = shape[axis] - before - after
    reference = (front + behind)[0]
    zeros = torch.zeros(between, dtype=reference.dtype, device=reference.device)
    parts = [_alike(part, shape, axis) for part in front], [_alike(part, shape, axis) for part in behind]
    constant = torch.cat([*parts[0], zeros, *parts[1]], axis)
    last = node
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is not None and is_call(reader, aten.add) and argument(reader, "alpha", 1) == 1:
        other = next((value for value in reader.args[:2] if value is not node), None)
        added = rewrite.constant(other)
        if added is not None and added.ndim <= len(shape) and rewrite.shape(reader) == rewrite.shape(node):
            constant, last = constant + added, reader
    rewrite.at(last)
    amounts = [0, 0] * (len(shape) - 1 - axis) + [before, after]
    padded = rewrite.call(aten.pad.default, source, amounts)
    made = rewrite.call(aten.add.Tensor, padded, rewrite.put(constant))
    rewrite.replace(last, made)


def _expanded_constant(rewrite: Rewrite, item: Any) -> torch.Tensor | None:
    """The constant that an item repeats for every image; None for what depends on the images."""
    if is_call(item, aten.expand, aten.repeat):
        found = rewrite.constant(item.args[0])
        batched = rewrite.batched(item)
        return (
            found
            if found is not None and batched is not None and _alike_but(rewrite, item, found, batched)
            else None
        )
    return rewrite.constant(item)


def _alike_but(rewrite: Rewrite, item: Node, found: torch.Tensor, batched: int) -> bool:
    shape = list(rewrite.shape(item))
    shape[batched] = 1
    return shape == [1] * (len(shape) - found.ndim) + list(found.shape)


def _alike(part: torch.Tensor, shape: list[int], axis: int) -> torch.Tensor:
    wanted = [part.shape[axis] if place == axis else edge for place, edge in enumerate(shape)]
    return part.expand(wanted)
