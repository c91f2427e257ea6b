"""A chain of reshapes and permutations as one movement of axes.

Each axis of the result is a run of factors of the source's axes: (B, 56, 56, C) in windows of 7 x 7 is
(B 8 8, 7 7, C) over the factors B, 8, 7, 8, 7, C. So every chain, however long, is a reshape into factors,
one permutation and a reshape out of them; where factors stay neighbours they are one, and a step that does
nothing is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

BATCH = 0
"""Stands for the length of the batch among the lengths of factors."""

Length = tuple[int, bool]
"""The length of an axis: so many times the batch, or so many."""


@dataclass(frozen=True)
class Factor:
    """A piece of a source's axis: its place in the order of the source, and its length."""

    place: tuple[int, ...]
    length: int


Layout = tuple[tuple[Factor, ...], ...]
"""For each axis of a value the factors that it consists of, outermost first."""


def source_layout(lengths: Sequence[Length]) -> Layout:
    """A value as it is; axes of length one have no factors."""
    layout = []
    for axis, (number, batched) in enumerate(lengths):
        batch = (Factor((axis, 0), BATCH),) if batched else ()
        rest = (Factor((axis, 1), number),) if number != 1 else ()
        layout.append(batch + rest)
    return tuple(layout)


def permuted(layout: Layout, order: Sequence[int]) -> Layout:
    return tuple(layout[axis] for axis in order)


def reshaped(
    layout: Layout, lengths: Sequence[Length]
) -> tuple[Layout, dict[Factor, tuple[Factor, ...]]] | None:
    """The same factors in axes of other lengths, and which of them had to be split; None if they do not
    fit.
    """
    pending = [factor for axis in layout for factor in axis]
    splits: dict[Factor, tuple[Factor, ...]] = {}
    axes = []
    for number, batched in lengths:
        taken: list[Factor] = []
        while number != 1 or batched:
            if not pending:
                return None
            factor = pending.pop(0)
            if factor.length == BATCH:
                if not batched:
                    return None
                batched = False
            elif number % factor.length == 0:
                number //= factor.length
            elif factor.length % number == 0 and number != 1:
                outer = Factor((*factor.place, 0), number)
                inner = Factor((*factor.place, 1), factor.length // number)
                splits[factor] = (outer, inner)
                pending.insert(0, inner)
                factor, number = outer, 1
            else:
                return None
            taken.append(factor)
        axes.append(tuple(taken))
    return None if pending else (tuple(axes), splits)


@dataclass(frozen=True)
class Movement:
    """How to make one value from another: reshape, permute, reshape; None where a step does nothing.

    Lengths have -1 for the one that grows with the batch.
    """

    into: tuple[int, ...] | None
    order: tuple[int, ...] | None
    out_of: tuple[int, ...] | None

    def __len__(self) -> int:
        return sum(step is not None for step in (self.into, self.order, self.out_of))


def movement(source: Sequence[Length], target: Layout, lengths: Sequence[Length]) -> Movement:
    """The shortest way from a value of axes `source` to `target`, whose axes have these `lengths`.

    The permutation may be one of the source's own axes, of the target's, or of runs of factors.
    """
    start, end = tuple(map(_shape, source)), tuple(map(_shape, lengths))
    factors = [factor for axis in target for factor in axis]
    rank = {factor: place for place, factor in enumerate(sorted(factors, key=lambda factor: factor.place))}
    runs = _runs(factors, rank)
    if runs == sorted(runs, key=_place):
        return Movement(None, None, None if start == end else end)
    ways = [_by_runs(runs, start, end)]
    if (of_source := _by_axes(source_layout(source), target, runs, start, end)) is not None:
        ways.append(of_source)
    if all(len(_runs(axis, rank)) <= 1 for axis in target):
        ways.append(_by_target(target, start, end))
    return min(reversed(ways), key=len)


def _by_runs(runs: list[tuple[Factor, ...]], start: tuple[int, ...], end: tuple[int, ...]) -> Movement:
    """Reshape into runs, permute them, reshape."""
    in_order = sorted(runs, key=_place)
    into = tuple(_length(run) for run in in_order)
    order = tuple(in_order.index(run) for run in runs)
    after = tuple(into[place] for place in order)
    return Movement(None if start == into else into, order, None if after == end else end)


def _by_axes(
    source: Layout,
    target: Layout,
    runs: list[tuple[Factor, ...]],
    start: tuple[int, ...],
    end: tuple[int, ...],
) -> Movement | None:
    """Permute the source's own axes, then reshape; None where one of them is torn apart."""
    owner = {factor: axis for axis, factors in enumerate(source) for factor in factors}
    order: list[int] = []
    for run in runs:
        if any(factor not in owner for factor in run):
            return None
        order += dict.fromkeys(owner[factor] for factor in run)
    spare = [axis for axis, factors in enumerate(source) if not factors]
    if len(order) + len(spare) != len(source):
        return None
    placed = list(order)
    for place, factors in enumerate(target):
        if not factors and spare:
            placed.insert(place, spare.pop(0))
    placed += spare
    after = tuple(start[axis] for axis in placed)
    return Movement(None, tuple(placed), None if after == end else end)


def _by_target(target: Layout, start: tuple[int, ...], end: tuple[int, ...]) -> Movement:
    """Reshape into the target's axes, in the order of the source, then permute them."""
    in_order = sorted(range(len(target)), key=lambda axis: _place(target[axis]))
    into = tuple(end[axis] for axis in in_order)
    order = tuple(in_order.index(axis) for axis in range(len(target)))
    return Movement(None if start == into else into, order, None)


def _place(run: tuple[Factor, ...]) -> tuple[int, ...]:
    """For the order of runs; what has no factors comes first."""
    return run[0].place if run else ()


def _runs(factors: Sequence[Factor], rank: Mapping[Factor, int]) -> list[tuple[Factor, ...]]:
    """Neighbours that are neighbours in the source too, together."""
    runs: list[list[Factor]] = []
    for factor in factors:
        if runs and rank[factor] == rank[runs[-1][-1]] + 1:
            runs[-1].append(factor)
        else:
            runs.append([factor])
    return [tuple(run) for run in runs]


def _length(run: tuple[Factor, ...]) -> int:
    return -1 if any(factor.length == BATCH for factor in run) else prod(factor.length for factor in run)


def _shape(length: Length) -> int:
    number, batched = length
    return -1 if batched else number
