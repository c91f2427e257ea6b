"""Shapes of the commonest operations by formula.

torch finds them too, on fake tensors, and takes a hundred times as long: it decomposes each operation in
Python. A rule answers only where it is sure; `None` leaves the operation to torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Sized:
    """A tensor without its numbers."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def reshaped(self, *shape: int) -> Sized:
        return Sized(torch.Size(shape), self.dtype, self.device)


def sized(tensor: torch.Tensor) -> Sized:
    return Sized(tensor.shape, tensor.dtype, tensor.device)


def module_rule(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `module(*args)` returns, or None."""
    if kwargs or len(args) != 1 or not isinstance(args[0], Sized):
        return None
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    x, kind = args[0], type(module)
    if kind is nn.Linear:
        return _linear(x, module.weight)
    if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return _convolution(x, module)
    if (
        isinstance(module, nn.LSTM)
        and kind is nn.LSTM
        and module.batch_first
        and not module.proj_size
        and len(x.shape) == 3
    ):
        return _lstm(x, module)
    known = kind.__module__.startswith(("torch.nn.modules.", "timm.layers."))
    if not known or not isinstance(module, _KEEP_SHAPE):  # a weight may be computed, and write as it is read
        return None
    weight = getattr(module, "weight", None)
    return x if not isinstance(weight, torch.Tensor) or weight.dtype == x.dtype else None


def function_rule(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `function(*args)` returns, or None."""
    if not args or not isinstance(args[0], Sized):
        return _arithmetic(*args) if function in _ARITHMETIC and len(args) == 2 and not kwargs else None
    x = args[0]
    if function is getattr and len(args) == 2:
        return _attribute(x, args[1])
    if function in _ARITHMETIC and len(args) == 2 and not kwargs:
        return _arithmetic(*args)
    if function in (operator.matmul, torch.matmul) and len(args) == 2:
        return _matmul(*args)
    if function is F.linear and len(args) > 1:
        return _linear(x, args[1])
    if function is F.scaled_dot_product_attention and len(args) >= 3:
        return _attention(*args[:3])
    if function in (torch.mean, torch.pow, torch.rsqrt, torch.sqrt, torch.exp):
        return method_rule(function.__name__, args, kwargs)
    if function in _KEEP_SHAPE_FUNCTIONS and "dtype" not in kwargs:
        return x if all(other.dtype == x.dtype for other in _tensors(args, kwargs)) else None
    name = getattr(function, "__name__", "")
    return _view(x, function, args[1:], kwargs) if function is operator.getitem or name in _VIEWS else None


def _lstm(x: Sized, module: nn.LSTM) -> tuple[Sized, tuple[Sized, Sized]]:
    """Batch first: the outputs, and the last hidden and cell states."""
    batch, length, _ = x.shape
    directions = 2 if module.bidirectional else 1
    state = x.reshaped(directions * module.num_layers, batch, module.hidden_size)
    return x.reshaped(batch, length, directions * module.hidden_size), (state, state)


def method_rule(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `args[0].name(*args[1:])` returns, or None."""
    if not args or not isinstance(args[0], Sized):
        return None
    x = args[0]
    if name == "size":
        return x.shape[args[1]] if len(args) == 2 else x.shape if len(args) == 1 and not kwargs else None
    if name == "dim":
        return len(x.shape)
    if name in _KEEP_SHAPE_METHODS and "dtype" not in kwargs:
        return x
    if name == "mean":
        return _mean(*args, **kwargs)
    if name in _ELEMENTWISE:
        return x if x.dtype.is_floating_point and len(args) == 1 and not kwargs else None
    if name == "pow" and len(args) == 2 and type(args[1]) in (int, float):
        return x if x.dtype.is_floating_point else None
    if name in ("add", "sub", "mul", "div") and len(args) == 2 and not kwargs:
        return _arithmetic(*args)
    if name in ("add_", "sub_", "mul_", "div_") and len(args) == 2:
        return x if _arithmetic(*args) == x else None
    return _view(x, getattr(torch.Tensor, name), args[1:], kwargs) if name in _VIEWS else None


def _attribute(x: Sized, name: str) -> Any:
    known = {"shape": x.shape, "dtype": x.dtype, "device": x.device, "ndim": len(x.shape)}
    return known.get(name)


def _linear(x: Sized, weight: Any) -> Sized | None:
    if weight.dtype != x.dtype or len(weight.shape) != 2 or x.shape[-1:] != weight.shape[1:]:
        return None
    return x.reshaped(*x.shape[:-1], weight.shape[0])


def _convolution(x: Sized, module: Any) -> Sized | None:
    spatial = len(module.kernel_size)
    if isinstance(module.padding, str) or len(x.shape) != spatial + 2 or module.weight.dtype != x.dtype:
        return None
    if x.shape[1] != module.in_channels:
        return None
    settings = zip(
        x.shape[2:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True
    )
    edges = [(n + 2 * pad - gap * (k - 1) - 1) // step + 1 for n, k, step, pad, gap in settings]
    return x.reshaped(x.shape[0], module.out_channels, *edges) if min(edges) > 0 else None


def _arithmetic(one: Any, other: Any) -> Sized | None:
    """Tensors of one floating dtype, or such a tensor and a number."""
    if not isinstance(one, Sized):
        one, other = other, one
    if not isinstance(one, Sized) or not one.dtype.is_floating_point:
        return None
    if type(other) in (int, float):
        return one
    if not isinstance(other, Sized) or (one.dtype, one.device) != (other.dtype, other.device):
        return None
    shape = _broadcast(one.shape, other.shape)
    return None if shape is None else one.reshaped(*shape)


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    if len(one) < len(other):
        one, other = other, one
    other = (1,) * (len(one) - len(other)) + tuple(other)
    if any(a != b and 1 not in (a, b) for a, b in zip(one, other, strict=True)):
        return None
    return tuple(b if a == 1 else a for a, b in zip(one, other, strict=True))


def _matmul(one: Any, other: Any) -> Sized | None:
    if not isinstance(other, Sized) or (one.dtype, one.device) != (other.dtype, other.device):
        return None
    if min(len(one.shape), len(other.shape)) < 2 or one.shape[-1] != other.shape[-2]:
        return None
    batch = _broadcast(one.shape[:-2], other.shape[:-2])
    return None if batch is None else one.reshaped(*batch, one.shape[-2], other.shape[-1])


def _attention(query: Sized, key: Any, value: Any) -> Sized | None:
    plain = isinstance(key, Sized) and isinstance(value, Sized)
    if not plain or not query.dtype == key.dtype == value.dtype or len(query.shape) < 3:
        return None
    if len(query.shape) != len(value.shape) or key.shape[:-1] != value.shape[:-1]:
        return None
    batch = _broadcast(query.shape[:-2], value.shape[:-2])
    if batch is None or query.shape[-1] != key.shape[-1]:
        return None
    return query.reshaped(*batch, query.shape[-2], value.shape[-1])


def _mean(x: Sized, dim: Any = None, keepdim: Any = False, **others: Any) -> Sized | None:
    dims = (dim,) if isinstance(dim, int) else dim
    known = isinstance(dims, (tuple, list)) and dims and isinstance(keepdim, bool) and not others
    if not known or not x.dtype.is_floating_point:
        return None
    axes = {axis % len(x.shape) for axis in dims}
    kept = [1 if axis in axes else n for axis, n in enumerate(x.shape) if keepdim or axis not in axes]
    return x.reshaped(*kept)


def _view(x: Sized, function: Callable[..., Any], rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What torch makes of a tensor on no device at all; views alone are fast there."""
    if _tensors(rest, kwargs) or not prod(x.shape):
        return None
    result = function(torch.empty(x.shape, dtype=x.dtype, device="meta"), *rest, **kwargs)
    if isinstance(result, torch.Tensor):
        return Sized(result.shape, result.dtype, x.device)
    return tuple(Sized(part.shape, part.dtype, x.device) for part in result)


def _tensors(*values: Any) -> list[Any]:
    """All tensors in nested arguments."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, (Sized, torch.Tensor)):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
        elif isinstance(value, slice):
            found += _tensors(value.start, value.stop, value.step)
    return found


_KEEP_SHAPE = (
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd),
    *(nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Softmax, nn.Identity),
    *(nn.Tanh, nn.LeakyReLU, nn.ELU, nn.PReLU, nn.Mish),
)
_KEEP_SHAPE_FUNCTIONS = {
    *(F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.dropout, F.softmax, torch.softmax),
    *(F.gelu, F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, F.leaky_relu),
    *(torch.sigmoid, torch.relu, torch.tanh),
}
_KEEP_SHAPE_METHODS = {"softmax", "relu", "contiguous", "clone", "detach"}
_ELEMENTWISE = {"sigmoid", "tanh", "rsqrt", "sqrt", "exp"}
_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul}
_VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "unsqueeze", "squeeze", "chunk"),
    *("split", "unbind", "expand", "narrow", "select", "swapaxes", "movedim"),
}
