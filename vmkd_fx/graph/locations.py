"""Tensors that know which location each of their elements comes from.

A `Located` tensor holds no data. It holds, for every element, the number of the one location of the branch's
input that the element depends on, or 0 where it depends on none. Operations that only move elements are run
on these numbers as they are. Those that compute follow the rules in `location_rules.py`; where one would make
an element depend on two locations it raises `Mixed`. So a function or a module need not be known: what it
does to the elements shows.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch.utils._pytree import tree_map


class Mixed(Exception):  # noqa: N818 (the answer, not a failure)
    """An operation makes an element depend on two locations; says which."""


class NotUnderstood(Exception):  # noqa: N818 (an answer too)
    """An operation about which nothing is known; says which."""


class Written(Exception):  # noqa: N818 (a request)
    """An operation writes other locations into a tensor whose numbers may stand for several tensors."""


OWN_MEMORY: ContextVar[bool] = ContextVar("OWN_MEMORY", default=False)
"""Whether every tensor that an operation makes has numbers of its own, so that they can be written to.

Without it a tensor shares them with what it was computed from, which costs neither time nor memory.
"""

_ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class Located(torch.Tensor):
    """A tensor of `locations` (float32, 0 for none) that gives itself out as one of `dtype` on `device`."""

    locations: torch.Tensor

    @staticmethod
    def __new__(cls, locations: torch.Tensor, dtype: torch.dtype, device: torch.device) -> Located:
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            locations.shape,
            strides=locations.stride(),
            storage_offset=locations.storage_offset(),
            dtype=dtype,
            device=device,
        )
        found.locations = locations
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Located({tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from vmkd_fx.graph.location_rules import recurrence

        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name in _RECURRENT:
                return recurrence(func, args)
            try:
                return func(*args, **(kwargs or {}))
            except Mixed as answer:
                raise (Mixed("attention") if name in _ATTENTION else answer) from None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        from vmkd_fx.graph.location_follow import follow

        return follow(func, tuple(args), dict(kwargs or {}))


def number_locations(shape: tuple[int, ...], axes: frozenset[int]) -> torch.Tensor:
    """Numbers 1, 2, ... of the locations of a tensor of `shape`: those on `axes`, for each image anew."""
    kept = [length if axis == 0 or axis in axes else 1 for axis, length in enumerate(shape)]
    count = 1
    for length in kept:
        count *= length
    return torch.arange(1.0, count + 1).reshape(kept).expand(shape)


def nowhere(tensor: torch.Tensor) -> Located:
    """A tensor of the same kind none of whose elements depends on a location."""
    numbers = torch.zeros(tensor.shape) if OWN_MEMORY.get() else torch.zeros(()).expand(tensor.shape)
    return Located(numbers, tensor.dtype, tensor.device)


def locations_of(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a located tensor, zeros for any other."""
    return tensor.locations if isinstance(tensor, Located) else torch.zeros(()).expand(tensor.shape)


def join(first: torch.Tensor, second: torch.Tensor, by: str) -> torch.Tensor:
    """Numbers of what depends on both, broadcast.

    Raises:
        Mixed: on two different locations.
    """
    shape = torch.broadcast_shapes(first.shape, second.shape)
    first, second = compact(first), compact(second)
    if first.data_ptr() == second.data_ptr() and (first.shape, first.stride()) == (
        second.shape,
        second.stride(),
    ):
        return first.expand(shape)
    if bool(((first != second) & (first != 0) & (second != 0)).any()):
        raise Mixed(by)
    return torch.maximum(first, second).expand(shape)


def gather(numbers: torch.Tensor, dims: tuple[int, ...], by: str) -> torch.Tensor:
    """Numbers of what depends on everything along `dims`, which keep length one.

    Raises:
        Mixed: on two different locations.
    """
    if not dims or not numbers.numel():
        return numbers
    shape = [1 if axis in dims else length for axis, length in enumerate(numbers.shape)]
    numbers = compact(numbers)
    highest = numbers.amax(dims, keepdim=True)
    if bool(((numbers != highest) & (numbers != 0)).any()):
        raise Mixed(by)
    return highest.expand(shape)


def compact(numbers: torch.Tensor) -> torch.Tensor:
    """The numbers with length one on the axes along which they were only expanded, the channels mostly."""
    for axis, (stride, length) in enumerate(zip(numbers.stride(), numbers.shape, strict=True)):
        if stride == 0 and length > 1:
            numbers = numbers.narrow(axis, 0, 1)
    return numbers


def meet(rows: torch.Tensor, columns: torch.Tensor, by: str) -> torch.Tensor:
    """`join` of (..., N, 1) with (..., 1, M), decided without a look at all N * M pairs.

    Raises:
        Mixed: some row and some column have different locations.
    """
    rows, columns = compact(rows), compact(columns)
    if not rows.numel() or not columns.numel():
        return join(rows, columns, by)
    highest_row, highest_column = rows.amax(-2), columns.amax(-1)
    lowest = torch.minimum(_lowest(rows, -2), _lowest(columns, -1))
    both = (highest_row > 0) & (highest_column > 0)
    if bool((both & (torch.maximum(highest_row, highest_column) > lowest)).any()):
        raise Mixed(by)
    return torch.maximum(rows, columns)


def _lowest(numbers: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.where(numbers == 0, torch.inf, numbers).amin(axis)


def concatenate(parts: list[torch.Tensor], axis: int) -> torch.Tensor:
    """`torch.cat`, compact where all parts are."""
    parts = [part for part in parts if part.numel()]
    shape = [*parts[0].shape]
    shape[axis] = sum(part.shape[axis] for part in parts)
    for at in range(len(shape)):
        if at != axis % len(shape) and all(part.stride(at) == 0 for part in parts):
            parts = [part.narrow(at, 0, 1) for part in parts]
    heads = [part.narrow(axis, 0, 1) for part in parts]
    if all(part.stride(axis) == 0 for part in parts) and all(torch.equal(head, heads[0]) for head in heads):
        return heads[0].expand(shape)
    return torch.cat(parts, axis).expand(shape)


def on_meta(value: Any) -> Any:
    """Arguments with every tensor replaced by one without data, so that an operation can be asked for its
    shapes.
    """

    def bare(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return torch.empty(item.shape, dtype=item.dtype, device="meta")
        return torch.device("meta") if isinstance(item, torch.device) else item

    return tree_map(bare, value)
