"""What stands between the layers of random networks: constants, activations, pools, layouts and traps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.mlp_mixer import Affine
from torch import Tensor, nn

from tests.random_layers import Apply, Made, Place, chain

# Constants

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x * c": lambda x, c: x * c,
    "x + c": lambda x, c: x + c,
    "x - c": lambda x, c: x - c,
    "c - x": lambda x, c: c - x,
    "x / c": lambda x, c: x / c,
    "c / x": lambda x, c: c / (x.sigmoid() + 0.5),
    "torch.add": lambda x, c: torch.add(x, c, alpha=2),
    "torch.sub": lambda x, c: torch.sub(c, x, alpha=0.5),
    "torch.rsub": lambda x, c: torch.rsub(x, c, alpha=0.5),
    "x *= c": lambda x, c: (x + 0).mul_(c),
    "x * c + c": lambda x, c: x * c + c,
    "-x * c": lambda x, c: -x * c,
}
CONSTANTS = ("channel", "number", "0-d", "other axis", "last axis", "whole", "buffer", "computed", "sample")


def constant(place: Place, operation: str = "x * c", of: str = "channel", negative: bool = False) -> Made:
    """A constant against the features; "sample" is no constant, for it differs between samples."""
    shapes = {"0-d": (), "whole": place.shape, "last axis": place.shape[-1:]}
    other = 1 + place.axis % len(place.shape)
    shapes["other axis"] = place.along(other)
    tensor = 0.6 + 0.8 * torch.rand(shapes.get(of, place.along(place.axis)))
    if negative:
        tensor = torch.where(torch.rand(tensor.shape) < 0.5, -tensor, tensor)
    apply = OPERATIONS[operation]
    if of == "number":
        number = -1.5 if negative else 1.5
        return Apply(lambda m, x: apply(x, m.number), number=number) if _plain(operation) else Apply(
            lambda m, x: apply(x, torch.full((), m.number, dtype=x.dtype)), number=number
        ), place
    if of == "sample":
        return Apply(lambda m, x: apply(x, _statistic(x) * m.c), c=nn.Parameter(tensor)), place
    if of == "computed":  # from a tensor that is no parameter, by more than one step
        return Apply(lambda m, x: apply(x, m.c.exp() / 2 - 0.2), c=nn.Parameter(tensor)), place
    if of == "buffer":
        module = Apply(lambda m, x: apply(x, m.c))
        module.register_buffer("c", tensor)
        return module, place
    return Apply(lambda m, x: apply(x, m.c), c=nn.Parameter(tensor)), place


def _plain(operation: str) -> bool:
    """Whether the operation takes a Python number on the side where the constant stands."""
    return operation not in ("torch.sub", "-x * c")


def _statistic(x: Tensor) -> Tensor:
    return 1 + x.mean(tuple(range(1, x.dim())), keepdim=True).tanh() / 2


def position(place: Place, learned: bool = True) -> Made:
    """A position embedding: a parameter, or what depends on nothing and is computed in every forward."""
    if learned:
        return Apply(lambda m, x: x + m.c, c=nn.Parameter(torch.randn(1, *place.shape) / 2)), place
    size = place.shape[-1]
    return Apply(lambda m, x: x + torch.linspace(-1, 1, size, dtype=x.dtype, device=x.device).sin()), place


def affine(place: Place, how: str = "affine") -> Made:
    """ResMLP's affine; or less its input (RIFormer); or read by two others; or with channels in between."""
    size = place.along(place.axis)
    scale, shift = 0.6 + 0.8 * torch.rand(size), torch.randn(size) / 3
    parts = {"s": nn.Parameter(scale), "t": nn.Parameter(shift)}
    if how == "timm" and place.axis == len(place.shape):
        return Affine(place.channels), place
    if how == "minus":
        return Apply(lambda m, x: x * m.s + m.t - x, **parts), place
    if how == "minus, the other way":
        return Apply(lambda m, x: x - (x * m.s + m.t), **parts), place
    if how == "read twice":
        return Apply(lambda m, x: _twice(x * m.s + m.t), **parts), place
    if how == "addcmul":
        return Apply(lambda m, x: torch.addcmul(m.t, x, m.s, value=0.5), **parts), place
    return Apply(lambda m, x: x * m.s + m.t, **parts), place


def _twice(y: Tensor) -> Tensor:
    return y + torch.tanh(y)


def buffer_written(place: Place) -> Made:
    """A buffer that is written in forward and then read."""
    module = Apply(_write)
    module.register_buffer("level", torch.ones(()))
    return module, place


def _write(m: Any, x: Tensor) -> Tensor:
    m.level.copy_(x.abs().mean() + 0.5)
    return x / m.level


# Elementwise

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "silu in place": lambda: nn.SiLU(inplace=True),
    "hardswish": nn.Hardswish,
    "gelu tanh": lambda: nn.GELU(approximate="tanh"),
    "leaky": lambda: nn.LeakyReLU(0.1),
    "prelu": nn.PReLU,
}


def activation(place: Place, of: str = "relu") -> Made:
    return ACTIVATIONS[of](), place


def no_op(place: Place, of: str = "dropout") -> Made:
    parts: dict[str, Callable[[], nn.Module]] = {
        "dropout": lambda: nn.Dropout(0.3),
        "identity": nn.Identity,
        "drop path": lambda: DropPath(0.3),
        "add nothing": lambda: Apply(lambda m, x: (x + 0) * 1),
        "contiguous": lambda: Apply(lambda m, x: x.contiguous().clone()),
    }
    return parts[of](), place


def centre(place: Place, over: str = "channels") -> Made:
    """Less its own mean, over the channels or over everything else."""
    others = tuple(i for i in range(1, len(place.shape) + 1) if i != place.axis)
    axes = (place.axis,) if over == "channels" or not others else others
    return Apply(lambda m, x: x - x.mean(axes, keepdim=True)), place


# Channels and locations that move


def moved(place: Place, how: str = "shuffle") -> Made:
    """The same numbers elsewhere: a constant per channel may not cross as if nothing had happened."""
    axis, c = place.axis, place.channels
    if how == "shuffle" and c % 2 == 0:
        return Apply(
            lambda m, x: x.unflatten(axis, (2, c // 2)).transpose(axis, axis + 1).flatten(axis, axis + 1)
        ), place
    if how == "roll":
        return Apply(lambda m, x: torch.roll(x, 1, axis)), place
    if how == "roll places" and len(place.shape) > 1:
        return Apply(lambda m, x: torch.roll(x, 1, 1 + axis % (x.dim() - 1))), place
    if how == "half" and c % 2 == 0:
        return Apply(lambda m, x: x.narrow(axis, 0, c // 2)), replace(place, channels=c // 2)
    if how == "indexed":
        order = torch.arange(c - 1, -1, -1)
        return Apply(lambda m, x: x.index_select(axis, m.order), order=nn.Parameter(order, False)), place
    return Apply(lambda m, x: x.flip(axis)), place


def pool(place: Place, of: str = "average", padded: bool = False, counted: bool = True) -> Made:
    if min(place.height, place.width) < 4:
        return nn.Identity(), place
    stride, pad = (1, 1) if place.fixed else (2, int(padded))
    parts: dict[str, Callable[[], nn.Module]] = {
        "average": lambda: nn.AvgPool2d(3, stride, pad, count_include_pad=counted),
        "maximum": lambda: nn.MaxPool2d(3, stride, pad),
    }
    if of == "adaptive" and not place.fixed:
        return nn.AdaptiveAvgPool2d(3), replace(place, height=3, width=3)
    height, width = ((n + 2 * pad - 3) // stride + 1 for n in (place.height, place.width))
    return parts.get(of, parts["average"])(), replace(place, height=height, width=width)


def padded(place: Place, value: float = 0.0) -> Made:
    """One row of a constant on top, one column of it on the left; where sizes must stay, the last ones go."""
    if place.fixed:
        return Apply(lambda m, x: F.pad(x, (1, 0, 1, 0), value=value)[:, :, :-1, :-1]), place
    larger = replace(place, height=place.height + 1, width=place.width + 1)
    return Apply(lambda m, x: F.pad(x, (1, 0, 1, 0), value=value)), larger


def subsampled(place: Place) -> Made:
    if place.fixed or min(place.height, place.width) < 4:
        return nn.Identity(), place
    half = replace(place, height=(place.height + 1) // 2, width=(place.width + 1) // 2)
    return Apply(lambda m, x: x[:, :, ::2, ::2]), half


def class_token(place: Place) -> Made:
    if place.fixed or place.prefix:
        return nn.Identity(), place
    token = nn.Parameter(torch.randn(1, 1, place.channels))
    module = Apply(lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1), token=token)
    return module, replace(place, prefix=1)


# Layouts


def laid_out(place: Place, layout: str, style: int = 0) -> Made:
    """From one layout to another, in one of two spellings."""
    if place.layout == layout:
        return nn.Identity(), place
    if "nc" in (place.layout, layout):
        raise ValueError(f"nothing leads from {place.layout} to {layout}")
    if layout in ("nchw", "nhwc") and place.layout in ("nlc", "ncl"):
        return _unflattened(place, layout, style)
    after = replace(place, layout=layout)
    spatial, there = ("nchw", "nhwc"), place.layout
    if {there, layout} in ({"nchw", "nhwc"}, {"nlc", "ncl"}):
        return chain(_turn(there, style)), after
    if there == "nhwc":
        body = Apply(
            lambda m, x: x.flatten(1, 2) if style else x.reshape(-1, m.n, m.c),
            n=place.tokens,
            c=place.channels,
        )
        return (body, after) if layout == "nlc" else (chain(body, _turn("nlc", style)), after)
    assert there in spatial
    flat = Apply(lambda m, x: x.flatten(2) if style else x.reshape(x.shape[0], x.shape[1], -1))
    return (flat, after) if layout == "ncl" else (chain(flat, _turn("ncl", style)), after)


def _turn(layout: str, style: int) -> nn.Module:
    if layout in ("nlc", "ncl"):
        return Apply(lambda m, x: x.transpose(1, 2) if style else x.permute(0, 2, 1))
    if layout == "nchw":
        return Apply(lambda m, x: x.transpose(1, 2).transpose(2, 3) if style else x.permute(0, 2, 3, 1))
    return Apply(lambda m, x: x.transpose(1, 3).transpose(2, 3) if style else x.permute(0, 3, 1, 2))


def _unflattened(place: Place, layout: str, style: int) -> Made:
    after = replace(place, layout=layout, prefix=0)
    parts: list[nn.Module] = []
    if place.prefix:
        axis = 1 if place.layout == "nlc" else 2
        parts.append(Apply(lambda m, x: x.narrow(axis, 1, m.n), n=place.tokens - 1))
    needed = "nlc" if layout == "nhwc" else "ncl"
    if place.layout != needed:
        parts.append(_turn(place.layout, style))
    first = (after.height, after.width)
    if layout == "nhwc":
        parts.append(Apply(lambda m, x: x.reshape(-1, *m.size, x.shape[2]), size=first))
    else:
        parts.append(
            Apply(
                lambda m, x: x.unflatten(2, m.size) if style else x.reshape(-1, m.c, *m.size),
                size=first,
                c=place.channels,
            )
        )
    return chain(*parts), after
