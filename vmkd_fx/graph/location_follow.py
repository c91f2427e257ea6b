"""An operation of ATen on located tensors: moved as it is, computed by its rule, or taken apart."""

from __future__ import annotations

from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.utils._pytree import tree_leaves, tree_map

from vmkd_fx.graph.location_rules import RULES, Arguments, Numbers, elementwise
from vmkd_fx.graph.locations import (
    OWN_MEMORY,
    Located,
    Mixed,
    NotUnderstood,
    Written,
    concatenate,
    locations_of,
    on_meta,
)

_MOVES = {
    *("_unsafe_view", "view", "reshape", "_reshape_alias", "expand", "permute", "transpose", "t", "alias"),
    *("unsqueeze", "squeeze", "select", "slice", "diagonal", "detach", "unbind", "split", "split_with_sizes"),
    *("unsafe_split", "unsafe_split_with_sizes", "cat", "stack", "repeat", "roll", "flip", "rot90"),
    *("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
    *("unfold", "im2col", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
    *("upsample_nearest1d", "upsample_nearest2d", "_upsample_nearest_exact2d", "triu", "tril"),
    *("index", "_unsafe_index", "index_select", "gather", "take", "index_put", "index_copy", "scatter"),
    *("slice_scatter", "select_scatter"),
}
_CHOOSES = {
    **dict.fromkeys(("index", "_unsafe_index", "index_put"), "indices"),
    **dict.fromkeys(("index_select", "gather", "take", "scatter", "index_copy"), "index"),
}
_ELEMENTWISE = {
    *("_to_copy", "hardswish", "hardtanh", "hardsigmoid", "_prelu_kernel", "leaky_relu", "celu", "softplus"),
    *("threshold", "log_sigmoid_forward", "rrelu_with_noise", "native_dropout", "dropout", "polar"),
    *("lift_fresh", "isnan", "masked_fill", "nan_to_num", "fake_quantize_per_tensor_affine"),
}
_FRESH = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty"),
    *("new_empty_strided", "new_zeros", "new_ones", "new_full", "fill", "zero"),
}
_ASKS = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "_unique2", "masked_select"}


def follow(func: Any, args: tuple[Any, ...], kwargs: Arguments) -> Any:
    """The result of an ATen operation on located tensors.

    Raises:
        Mixed: an element of it depends on two locations.
        NotUnderstood: there is no rule for the operation.
    """
    name = func._schema.name.split("::")[-1]
    writes = bool(func._schema.is_mutable)
    kind = name[:-1] if writes and name.endswith("_") else name
    given = _by_name(func, args, kwargs)
    if kind in _ASKS:
        raise NotUnderstood(f"{kind} decides by the data")
    if writes and (kind == name or not isinstance(args[0], Located)):
        raise NotUnderstood(f"{name} writes into a tensor that no location is known of")
    if not writes and kind in _MOVES:
        return _moved(func, kind, args, kwargs, given)
    numbers = _numbers(func, kind, args, kwargs, given)
    if numbers is None:
        return _decomposed(func, name, args, kwargs)
    if writes:
        return _write(args[0], numbers)
    return _located_as(func(*on_meta(args), **on_meta(kwargs)), numbers, _device(given), name)


def _write(target: Located, numbers: Numbers) -> Located:
    """Put numbers in place of those of `target`, and of all tensors that share memory with it."""
    numbers = numbers.expand(target.shape)
    if not torch.equal(numbers, target.locations):
        if not OWN_MEMORY.get():
            raise Written
        target.locations.copy_(numbers)
    return target


def _numbers(
    func: Any, kind: str, args: tuple[Any, ...], kwargs: Arguments, given: Arguments
) -> Numbers | None:
    """The numbers of what an operation computes; None where there is no rule for it."""
    if kind in _FRESH:
        return elementwise({"value": given.get("value")})
    if kind == "copy":
        return locations_of(given["src"])
    if kind in RULES:
        return RULES[kind](given)
    if kind in _MOVES:  # the kind that writes, index_put_ say
        functional = getattr(torch.ops.aten, kind).default
        return locations_of(_moved(functional, kind, args, kwargs, given))
    if kind in _ELEMENTWISE or torch.Tag.pointwise in func.tags:
        return elementwise(given)
    return None


def _moved(func: Any, kind: str, args: tuple[Any, ...], kwargs: Arguments, given: Arguments) -> Any:
    """Run what moves elements on the numbers themselves; what comes from outside has number 0."""
    chosen = tree_leaves(given.get(_CHOOSES.get(kind, "")))
    for index in chosen:
        if isinstance(index, Located) or (isinstance(index, torch.Tensor) and index.is_meta):
            raise NotUnderstood(f"{kind} takes elements by an index whose numbers are not known")
    if given.get("accumulate") or given.get("reduce") is not None:
        raise NotUnderstood(f"{kind} adds up elements")
    kept = {id(index) for index in chosen}

    def numbers(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        return item.cpu() if id(item) in kept else locations_of(item)

    positional, named = tree_map(numbers, args), tree_map(numbers, kwargs)
    if kind == "constant_pad_nd":
        positional, named = (*positional[:2], 0), {}
    if kind in ("view", "_unsafe_view", "_reshape_alias"):
        result: Any = positional[0].reshape(positional[1])
    elif kind == "cat" and any(part.numel() for part in positional[0]):
        result = concatenate(positional[0], given["dim"])
    else:
        result = func(*positional, **named)
    first = next(item for item in tree_leaves((args, kwargs)) if isinstance(item, Located))
    return tree_map(lambda item: Located(item, first.dtype, first.device), result)


def _located_as(results: Any, numbers: Numbers, device: torch.device, name: str) -> Any:
    """Results without data made located.

    Behind the first, `numbers` do not fit statistics that only a backward pass reads; those get none.
    """

    def located(result: Any) -> Any:
        if not isinstance(result, torch.Tensor):
            return result
        found = numbers if _fits(numbers, result) else torch.zeros(())
        found = found.expand(result.shape)
        if OWN_MEMORY.get():
            found = found.clone(memory_format=torch.contiguous_format)
        return Located(found, result.dtype, device)

    first = tree_leaves(results)[0]
    if not _fits(numbers, first):
        raise NotUnderstood(f"{name} returns {tuple(first.shape)} where {tuple(numbers.shape)} is expected")
    return tree_map(located, results)


def _fits(numbers: Numbers, result: torch.Tensor) -> bool:
    lengths = zip(reversed(numbers.shape), reversed(result.shape), strict=False)
    return numbers.ndim <= result.ndim and all(one in (1, other) for one, other in lengths)


def _decomposed(func: Any, name: str, args: tuple[Any, ...], kwargs: Arguments) -> Any:
    """What has no rule may consist of what has one."""
    parts = decomposition_table.get(func, func.decompose)
    try:
        if (result := parts(*args, **kwargs)) is not NotImplemented:
            return result
    except (Mixed, NotUnderstood, Written):
        raise
    except Exception as error:
        raise NotUnderstood(f"{name} is not understood") from error
    raise NotUnderstood(f"{name} is not understood")


def _by_name(func: Any, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    found = {}
    for place, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        found[argument.name] = args[place] if place < len(args) else kwargs.get(argument.name, default)
    return found


def _device(given: Arguments) -> torch.device:
    return next(item.device for item in tree_leaves(given) if isinstance(item, Located))
