"""float32 at least, also under autocast: sums over thousands of elements and exponentials do not fit into
half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def in_full_precision(function: Function) -> Function:
    """A function or method that computes without autocast, float16 and bfloat16 arguments as float32.

    float32 and float64 stay what they are. Tensors in lists, tuples and dictionaries count as arguments.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = next(_devices([*args, *kwargs.values()]), "cpu")
        args = tuple(widened(value) for value in args)
        kwargs = {name: widened(value) for name, value in kwargs.items()}
        with _without_autocast(device):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def widened(value: Any) -> Any:
    """Half-precision tensors as float32, in lists, tuples and dictionaries too; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if type(value) in (list, tuple):
        return type(value)([widened(item) for item in value])
    if type(value) is dict:
        return {name: widened(item) for name, item in value.items()}
    return value


def _devices(values: Iterable[Any]) -> Any:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value.device.type
        elif type(value) in (list, tuple):
            yield from _devices(value)
        elif type(value) is dict:
            yield from _devices(value.values())


def _without_autocast(device: str) -> Any:
    # The meta device has no autocast and refuses to be asked to leave it.
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()
