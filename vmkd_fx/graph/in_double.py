"""Compute a graph in double precision for a while, also where it names a precision of its own.

Proofs need float64 throughout: a graph that rounds to float32 halfway, as `softmax(dtype=float32)` does,
would hide an error below 1e-7 and invent one above 1e-12.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.node import map_aggregate

from vmkd_fx.errors import VerificationError
from vmkd_fx.graph.sizes import forget
from vmkd_fx.graph.traced import TracedModule

_DTYPES = "vmkd_dtypes"

_DOUBLE = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex128), torch.complex128),
}


def floats(module: torch.nn.Module, *, every_name: bool = False) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers that hold real numbers, by name: the first of a shared one, or every one."""
    once = not every_name
    tensors = [
        *module.named_parameters(remove_duplicate=once),
        *module.named_buffers(remove_duplicate=once),
    ]
    return [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]


def double_(module: TracedModule) -> TracedModule:
    """The module in float64, in place; what a graph casts its frames to follows."""
    module.double()
    if module.info.frames is not None:
        for cast in [cast for images in module.graph.find_nodes(op="placeholder") for cast in images.users]:
            cast.args, cast.kwargs = (map_aggregate(given, _doubled) for given in (cast.args, cast.kwargs))
        module.recompile()
    return module


def _doubled(value: Any) -> Any:
    return _DOUBLE.get(value, value) if isinstance(value, torch.dtype) else value


def name_double_(module: TracedModule) -> None:
    """Let the graph's operators name double precision wherever they name another; each remembers what it
    named, the first time.
    """
    for node in module.graph.nodes:
        if _DTYPES in node.meta:
            continue
        named: list[torch.dtype] = []

        def doubled(value: Any, named: list[torch.dtype] = named) -> Any:
            if isinstance(value, torch.dtype) and value in _DOUBLE:
                named.append(value)
                return _DOUBLE[value]
            return value

        args, kwargs = map_aggregate(node.args, doubled), map_aggregate(node.kwargs, doubled)
        if named:
            node.args, node.kwargs, node.meta[_DTYPES] = args, kwargs, tuple(named)


def leave_double_(
    module: TracedModule, dtype: torch.dtype, precisions: dict[str, torch.dtype], what: str
) -> None:
    """Back to `dtype`: tensors to their own of `precisions`, operators to what they named.

    An operator that named float64 named the precision of the graph it was made in, which is now `dtype`. One
    that a pass made named it because half precision is too little, and names float32 at least.

    Raises:
        VerificationError: a number does not fit.
    """
    complex_ = torch.complex128 if dtype == torch.float64 else torch.complex64
    follows = {torch.float64: dtype, torch.complex128: complex_}
    made = follows | {torch.float64: torch.promote_types(dtype, torch.float32)}
    for node in module.graph.nodes:
        named = iter(node.meta.pop(_DTYPES, ()))

        def restored(value: Any, named: Any = named) -> Any:
            if not isinstance(value, torch.dtype) or value not in _DOUBLE:
                return value
            own = next(named, None)
            return made.get(value, value) if own is None else follows.get(own, own)

        node.args = map_aggregate(node.args, restored)
        node.kwargs = map_aggregate(node.kwargs, restored)
        forget(node)
    for name, tensor in floats(module):
        was_finite = torch.isfinite(tensor)  # a mask may hold infinities of its own
        tensor.data = tensor.to(precisions.get(name, dtype))
        if not torch.equal(torch.isfinite(tensor), was_finite):
            raise VerificationError(f"{what}: {name} does not fit into {tensor.dtype}")
    module.recompile()
