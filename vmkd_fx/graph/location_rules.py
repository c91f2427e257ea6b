"""What the operations that compute do to locations: one rule for each kind, at the level of ATen.

A rule gets the operation's arguments by name and returns the numbers of its first result, up to
broadcasting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from vmkd_fx.graph.locations import (
    Located,
    Mixed,
    NotUnderstood,
    compact,
    gather,
    join,
    locations_of,
    meet,
    on_meta,
)

Arguments = dict[str, Any]
Numbers = torch.Tensor


def elementwise(given: Arguments) -> Numbers:
    """Sums, products, activations, comparisons: location by location, broadcast."""
    numbers = torch.zeros(())
    for item in tree_leaves(given):
        if isinstance(item, Located):
            numbers = join(numbers, item.locations, "tokens meet others") if numbers.ndim else item.locations
    return numbers


def _axes(dims: Any, rank: int) -> tuple[int, ...]:
    if dims is None or dims == []:
        return tuple(range(rank))
    return tuple(dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else (dims,)))


def _reduction(by: str, keeps: bool = False) -> Callable[[Arguments], Numbers]:
    """A statistic over the axes `dim`."""

    def rule(given: Arguments) -> Numbers:
        x = locations_of(given["self"])
        dims = _axes(given.get("dim"), x.ndim)
        found = gather(x, dims, by)
        if keeps or given.get("keepdim"):
            return found
        return found.squeeze(dims)

    return rule


def _product(left: str, right: str) -> Callable[[Arguments], Numbers]:
    """A matrix product (..., N, K) @ (..., K, M): the sum over K, then rows meet columns."""

    def rule(given: Arguments) -> Numbers:
        one, other = given[left], given[right]
        both = isinstance(one, Located) and isinstance(other, Located)
        by = "matrix product over tokens" if both else "linear over tokens"
        rows = gather(locations_of(one), (one.ndim - 1,), by)
        columns = locations_of(other)
        if columns.ndim == 1:
            columns = columns.unsqueeze(-1)
        columns = gather(columns, (columns.ndim - 2,), by)
        found = meet(rows, columns, by) if rows.ndim > 1 else join(rows, columns.squeeze(-1), by)
        found = found.expand(*found.shape[:-2], one.shape[-2], columns.shape[-1]) if rows.ndim > 1 else found
        if other.ndim == 1:
            found = found.squeeze(-1)
        added = given.get("self")
        if left != "self" and isinstance(added, Located):
            found = join(found, added.locations, "tokens meet others")
        return found

    return rule


def _distance(given: Arguments) -> Numbers:
    rows = gather(locations_of(given["x1"]), (given["x1"].ndim - 1,), "distance between tokens")
    columns = gather(locations_of(given["x2"]), (given["x2"].ndim - 1,), "distance between tokens")
    return join(rows, columns.transpose(-1, -2), "distance between tokens")


def _linear(given: Arguments) -> Numbers:
    x = given["input"]
    if isinstance(given["weight"], Located):
        raise NotUnderstood("a linear layer with weights made of tokens is not understood")
    return gather(locations_of(x), (x.ndim - 1,), "linear over tokens")


def _convolution(given: Arguments) -> Numbers:
    """Sums over channels first, then over the window: with all weights one, on numbers, squares and counts.

    Elements of one window agree where the squares of their sum and the sum of their squares do.
    """
    x, weight = given["input"], given["weight"]
    if not isinstance(x, Located):
        raise NotUnderstood("convolution with kernels made of tokens is not understood")
    groups, kernel = given["groups"], tuple(weight.shape[2:])
    batch, *space = (x.shape[0], *x.shape[2:])
    numbers = x.locations.reshape(batch, groups, -1, *space)
    numbers = gather(numbers, (2,), "convolution over tokens as channels").squeeze(2)
    alike = bool((compact(numbers) == numbers[:, :1]).all())
    apart = numbers[:, :1] if alike else numbers
    flat = apart.reshape(-1, 1, *space).double()
    sums = [
        _convolve(part, torch.ones(1, 1, *kernel, dtype=torch.double), given)
        for part in (flat, flat.square(), (flat != 0).double())
    ]
    total, squares, count = (part.reshape(batch, -1, *part.shape[2:]) for part in sums)
    if bool((count * squares - total.square() > 0.5).any()):
        raise Mixed(f"{'x'.join(map(str, kernel))} convolution")
    found = (total / count.clamp(min=1)).round().float()
    outputs = weight.shape[1] * groups if given["transposed"] else weight.shape[0]
    return found if alike else found.repeat_interleave(outputs // groups, 1)


def _convolve(x: Numbers, kernel: Numbers, given: Arguments) -> Numbers:
    settings = (given["stride"], given["padding"], given["dilation"], given["transposed"])
    return torch.ops.aten.convolution(x, kernel, None, *settings, given["output_padding"], 1)


def _pooling(pool: Callable[..., Numbers], *names: str) -> Callable[[Arguments], Numbers]:
    """The window's largest and smallest number; padding has none."""

    def rule(given: Arguments) -> Numbers:
        x = locations_of(given["self"])
        settings = {name: given[name] for name in names if given.get(name) not in (None, [])}
        if x.stride(1) == 0:
            x = x[:, :1]
        highest = pool(x, **settings)
        lowest = -pool(-torch.where(x == 0, torch.inf, x), **settings)
        if bool((lowest < highest).any()):
            raise Mixed("pooling")
        return highest

    return rule


def _scaled_dot_product(given: Arguments) -> Numbers:
    """Queries (..., L, E) meet keys and values (..., S, E), summed over S."""
    query, key, value = (locations_of(given[name]) for name in ("query", "key", "value"))
    rows = gather(query, (query.ndim - 1,), "attention")
    keys = gather(key, (key.ndim - 2, key.ndim - 1), "attention")
    values = gather(value, (value.ndim - 2,), "attention")
    if key.ndim > 2 and key.shape[-3] != query.shape[-3]:
        shared = query.shape[-3] // key.shape[-3]
        keys, values = (x.repeat_interleave(shared, -3) for x in (keys, values))
    return join(join(rows, keys, "attention"), values, "attention")


def _layer_norm(given: Arguments) -> Numbers:
    x = locations_of(given["input"])
    count = len(given["normalized_shape"])
    return gather(x, tuple(range(x.ndim - count, x.ndim)), "norm over tokens")


def _group_norm(given: Arguments) -> Numbers:
    x = locations_of(given["input"])
    grouped = x.reshape(x.shape[0], given["group"], -1)
    return gather(grouped, (2,), "norm over tokens").expand(grouped.shape).reshape(x.shape)


def _batch_norm(given: Arguments) -> Numbers:
    x = locations_of(given["input"])
    if given.get("training"):
        gather(x, (0, *range(2, x.ndim)), "norm over tokens")
    return x


def _interpolation(given: Arguments) -> Numbers:
    x = locations_of(given["self"])
    size = given.get("output_size")
    if size is not None and tuple(size) == tuple(x.shape[2:]):
        return x
    return gather(x, tuple(range(2, x.ndim)), "interpolation")


def _sampling(given: Arguments) -> Numbers:
    x, grid = locations_of(given["input"]), locations_of(given["grid"])
    x = gather(x, tuple(range(2, x.ndim)), "interpolation")
    return join(x, gather(grid, (grid.ndim - 1,), "interpolation").movedim(-1, 1), "interpolation")


def _folding(given: Arguments) -> Numbers:
    """Patches put back and added up where they overlap."""
    x = locations_of(given["self"]).double()
    settings = [given[name] for name in ("output_size", "kernel_size", "dilation", "padding", "stride")]
    parts = (x, x.square(), (x != 0).double())
    total, squares, count = (F.fold(part, *settings) for part in parts)
    if bool((count * squares - total.square() > 0.5).any()):
        raise Mixed("overlapping patches")
    return (total / count.clamp(min=1)).round().float()


def recurrence(func: Any, args: tuple[Any, ...]) -> Any:
    """torch's LSTM, GRU and RNN: every output depends on the whole sequence.

    The first argument is the input, (B, T, C) where the last says so, else (T, B, C) or (T, C); the second is
    the first state.
    """
    x, state, time = args[0], args[1], 1 if args[0].ndim == 3 and args[-1] is True else 0
    if not isinstance(args[-1], bool) or any(isinstance(item, Located) for item in tree_leaves(state)):
        raise NotUnderstood(f"{func.__name__} of packed sequences or with a state from tokens")
    numbers = gather(locations_of(x), (time, x.ndim - 1), "recurrence")
    output, *states = func(*on_meta(args))
    last = numbers.transpose(0, 1) if time else numbers
    return (
        Located(numbers.expand(output.shape).clone(), x.dtype, x.device),
        *(Located(last.expand(part.shape).clone(), x.dtype, x.device) for part in states),
    )


_SUM, _SOFTMAX = _reduction("pooling"), _reduction("softmax over tokens", keeps=True)
_SCAN, _SORT = _reduction("scan over tokens", keeps=True), _reduction("sorting of tokens", keeps=True)
_FOURIER = _reduction("Fourier transform over tokens", keeps=True)
_WINDOW = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

RULES: dict[str, Callable[[Arguments], Numbers]] = {
    **dict.fromkeys(
        (
            "sum",
            "mean",
            "amax",
            "amin",
            "max",
            "min",
            "var",
            "std",
            "var_mean",
            "std_mean",
            "prod",
            "norm",
            "any",
            "all",
        ),
        _SUM,
    ),
    **dict.fromkeys(("linalg_vector_norm", "logsumexp", "argmax", "argmin", "median", "nansum"), _SUM),
    **dict.fromkeys(("_softmax", "softmax", "_log_softmax", "_safe_softmax"), _SOFTMAX),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp", "_logcumsumexp", "cummax", "cummin"), _SCAN),
    **dict.fromkeys(("sort", "argsort", "topk", "kthvalue"), _SORT),
    **dict.fromkeys(("_fft_r2c", "_fft_c2c", "_fft_c2r"), _FOURIER),
    **dict.fromkeys(("mm", "mv", "dot", "bmm", "matmul"), lambda given: _either_product(given)),
    "addmm": _product("mat1", "mat2"),
    "baddbmm": _product("batch1", "batch2"),
    "linear": _linear,
    "_cdist_forward": _distance,
    "convolution": _convolution,
    "_convolution": _convolution,
    "avg_pool1d": _pooling(F.max_pool1d, *_WINDOW),
    **dict.fromkeys(
        ("avg_pool2d", "max_pool2d_with_indices", "max_pool2d"), _pooling(F.max_pool2d, *_WINDOW)
    ),
    **dict.fromkeys(("avg_pool3d", "max_pool3d_with_indices"), _pooling(F.max_pool3d, *_WINDOW)),
    **dict.fromkeys(
        ("_adaptive_avg_pool2d", "adaptive_max_pool2d"), _pooling(F.adaptive_max_pool2d, "output_size")
    ),
    "_adaptive_avg_pool3d": _pooling(F.adaptive_max_pool3d, "output_size"),
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm,
    "native_group_norm": _group_norm,
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"), _batch_norm),
    **dict.fromkeys(("_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm"), _batch_norm),
    **dict.fromkeys(("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d"), _interpolation),
    **dict.fromkeys(("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"), _interpolation),
    "grid_sampler_2d": _sampling,
    "col2im": _folding,
    "_scaled_dot_product_attention_math": _scaled_dot_product,
    "_scaled_dot_product_flash_attention_for_cpu": _scaled_dot_product,
    "_scaled_dot_product_flash_attention": _scaled_dot_product,
    "_scaled_dot_product_efficient_attention": _scaled_dot_product,
    "_scaled_dot_product_cudnn_attention": _scaled_dot_product,
}


def _either_product(given: Arguments) -> Numbers:
    other = next(name for name in ("mat2", "vec", "tensor", "other") if name in given)
    return _product("self", other)(given)
