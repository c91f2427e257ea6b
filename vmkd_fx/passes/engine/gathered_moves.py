"""A movement through padding or repetition as one gather of places, where an engine is built.

    x (.., W, 2 W - 1): pad, flatten, pad, reshape, slice, expand        relative to absolute positions
    = reshape, gather by constants, reshape

    x (.., H, W, C): pad the map with zeros to whole windows
    = reshape, gather by constants, zeros where nothing was, reshape

Such a chain only says where each number of its result comes from, so it is run on the places themselves:
they are one list for every image, or for every head of it. Where the batch is dynamic, TensorRT's parser
works out the shapes of paddings and expansions in layers of arithmetic, and a gather needs none. The same
numbers move. Zeros that are left in the result have to be whole rows of numbers, as tokens are: a map whose
every number would be looked up alone is better padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod

import torch
from torch.fx import Node

from vmkd_fx.passes.cleanup.views import is_view
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, is_call
from vmkd_fx.target import ENGINE_KINDS

aten = torch.ops.aten

NOTHING = -1


@dataclass(frozen=True)
class Gather:
    """Which `rows` of a value seen as (any, count, length) the result consists of, in its order.

    A row of `NOTHING` is one of zeros.
    """

    rows: torch.Tensor
    count: int
    length: int

    @property
    def empty(self) -> torch.Tensor:
        """Which rows are zeros."""
        return self.rows == NOTHING


def gather_of(places: torch.Tensor, count: int) -> Gather:
    """The gather that takes `places` (M,) from `count` numbers, over and over, with the fewest rows."""
    for parts in _divisors(count, len(places)):
        of_all = places.reshape(parts, -1)
        part = _shifted(of_all, -torch.arange(0, count, count // parts).unsqueeze(1))
        alike = (part == part[0]) & (part.eq(NOTHING) == of_all.eq(NOTHING))
        if bool(alike.all()) and int(part.max()) < count // parts:
            places, count = part[0], count // parts
            break
    for length in _divisors(count, len(places)):
        runs = places.reshape(-1, length)
        begin = runs[:, :1]
        whole = begin.eq(NOTHING) | (begin % length).eq(0)
        if bool((runs == _shifted(begin, torch.arange(length))).all()) and bool(whole.all()):
            break
    rows = begin.flatten().div(length, rounding_mode="floor")
    return Gather(rows, count // length, length)


def _shifted(places: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return torch.where(places == NOTHING, NOTHING, places + by)


def gather_moves(rewrite: Rewrite) -> None:
    """Replace each chain of movements that has a padding or an expansion in it."""
    if rewrite.target.kind not in ENGINE_KINDS:
        return
    for node in rewrite.calls(aten.pad, aten.expand):
        chain = _chain(node)
        begin = chain.index(node)
        if any(is_call(move, aten.pad, aten.expand) for move in chain[:begin]):
            continue  # seen from there
        ways = (_way(rewrite, chain[start:]) for start in range(begin + 1))
        found = next((way for way in ways if way is not None), None)
        if found is None:
            rewrite.refuse(node, "it reads another image, or pads numbers that are no rows")
        elif rewrite.take(chain[-1], f"{len(chain)} movements as a gather"):
            _write(rewrite, chain[-1], *found)


GATHERED_MOVES = LoweringPass("gathered_moves", gather_moves, {"views": "it writes shapes as numbers"})


def _chain(node: Node) -> list[Node]:
    """The movements before and behind `node` that nobody else reads, with it."""
    chain = [node]
    while _is_move(source := chain[0].args[0]) and len(source.users) == 1:  # type: ignore[union-attr]
        chain.insert(0, source)  # type: ignore[arg-type]
    while len(chain[-1].users) == 1 and _is_move(reader := next(iter(chain[-1].users))):
        chain.append(reader)
    return chain


def _is_move(node: object) -> bool:
    return is_view(node) or is_call(node, aten.pad, aten.expand, aten.slice)


def _way(rewrite: Rewrite, chain: list[Node]) -> tuple[Node, Gather] | None:
    """The source of a chain, and how its result is gathered from it; None if it cannot be."""
    source = chain[0].args[0]
    assert isinstance(source, Node)
    if None in (rewrite.batched(source), rewrite.batched(chain[-1])):
        return None
    if any(len(node.all_input_nodes) > 1 for node in chain):
        return None
    shape = rewrite.shape(source)  # of two images
    places = torch.arange(prod(shape), dtype=torch.float64).reshape(shape) - NOTHING
    count = places.numel() // 2
    for node in chain:
        places = node.target(places.contiguous(), *node.args[1:], **node.kwargs)  # type: ignore[operator]
    one, other = places.reshape(2, -1) + NOTHING  # a padding with zeros puts nothing there
    if not torch.equal(_shifted(one, torch.tensor(count)), other):
        return None  # it takes from one image for both, or pads with another number
    gather = gather_of(one.long(), count)
    return (source, gather) if gather.length > 1 or not gather.empty.any() else None


def _write(rewrite: Rewrite, node: Node, source: Node, gather: Gather) -> None:
    batched = rewrite.batched(node)
    into = [-1, gather.count] + [gather.length] * (gather.length > 1)
    out_of = [-1 if axis == batched else length for axis, length in enumerate(rewrite.shape(node))]
    value = rewrite.call(aten.reshape.default, source, into)
    rows = rewrite.put(gather.rows.clamp(min=0).int())
    value = rewrite.call(aten.index_select.default, value, 1, rows)
    if gather.empty.any():
        value = rewrite.call(aten.masked_fill.Scalar, value, rewrite.put(gather.empty.unsqueeze(1)), 0.0)
    rewrite.replace(node, rewrite.call(aten.reshape.default, value, out_of))


def _divisors(one: int, other: int) -> Iterator[int]:
    """Of both, the largest first."""
    both = gcd(one, other)
    return (number for number in range(both, 0, -1) if both % number == 0)
