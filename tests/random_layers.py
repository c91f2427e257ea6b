"""Layers of random networks: each fits whatever stands before it, so that every list of them is a network.

A layer is a function of the place it stands at and of options; an option that is impossible there is brought
to the nearest one that is possible. Taking any layer out of a network therefore leaves a network, which is
what lets a failing example shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

CHANNEL_AXIS = {"nchw": 1, "nhwc": 3, "nlc": 2, "ncl": 1, "nc": 1}
"""Of the layouts that features may have: images, tokens either way round, and one vector a sample."""


@dataclass(frozen=True)
class Place:
    """What stands between two layers: the layout, one sample's sizes, and whether the sizes must stay.

    Attributes:
        prefix: class tokens before the image's own, in "nlc" and "ncl".
    """

    layout: str
    channels: int
    height: int = 1
    width: int = 1
    prefix: int = 0
    fixed: bool = False

    @property
    def tokens(self) -> int:
        return self.height * self.width + self.prefix

    @property
    def axis(self) -> int:
        return CHANNEL_AXIS[self.layout]

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = {"nchw": (self.channels, self.height, self.width), "nlc": (self.tokens, self.channels)}
        sizes |= {"nhwc": (self.height, self.width, self.channels), "ncl": (self.channels, self.tokens)}
        return sizes.get(self.layout, (self.channels,))

    def along(self, axis: int) -> tuple[int, ...]:
        """The shape, without the batch, of a constant that differs along one axis alone."""
        return tuple(size if i + 1 == axis else 1 for i, size in enumerate(self.shape))


class Apply(nn.Module):
    """A function of the module and its input; what the function needs are the module's own attributes."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: object) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


Made = tuple[nn.Module, Place]


def chain(*parts: nn.Module) -> nn.Module:
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


# Convolutions and matrices

PADDINGS = ("zeros", "valid", "wide", "same", "asymmetric", "circular", "reflect", "replicate")
WEIGHTS = ("plain", "weight_norm", "spectral_norm", "standardised", "scaled", "strided", "also data")


def convolution(
    place: Place,
    out: int = 4,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    padding: str = "zeros",
    dilation: int = 1,
    bias: bool = True,
    weight: str = "plain",
) -> Made:
    """`groups` 0 is a depthwise convolution."""
    out = place.channels if groups == 0 else out
    groups = place.channels if groups == 0 else math.gcd(groups, math.gcd(place.channels, out))
    smallest = min(place.height, place.width)
    stride = 1 if place.fixed or smallest < 6 else stride
    if dilation * (kernel - 1) >= smallest:
        kernel = 1
    reach = dilation * (kernel - 1)
    if place.fixed and padding in ("valid", "wide"):
        padding = "zeros"
    if padding == "same" and stride > 1:
        padding = "valid"
    before = {"valid": 0, "same": reach // 2, "wide": 2, "asymmetric": 0}.get(padding, reach // 2)
    after = {"valid": 0, "same": reach - reach // 2, "wide": 2, "asymmetric": reach}.get(padding, before)
    if place.fixed and padding not in ("same", "asymmetric"):
        after = reach - before
    mode = padding if padding in ("circular", "reflect", "replicate") else "zeros"
    outside = before != after and padding != "same"
    conv = nn.Conv2d(
        place.channels,
        out,
        kernel,
        stride,
        "same" if padding == "same" else 0 if outside else before,
        dilation,
        groups,
        bias,
        mode,
    )
    pads = (before, after, before, after)
    body = weighted(conv, weight)
    if outside:
        body = nn.Sequential(Apply(lambda m, x: F.pad(x, m.pads), pads=pads), body)
    height, width = ((n + before + after - reach - 1) // stride + 1 for n in (place.height, place.width))
    return body, replace(place, channels=out, height=height, width=width)


def weighted(layer: nn.Module, how: str) -> nn.Module:
    """The layer with its weight computed, laid out or read in an unusual way."""
    if how == "weight_norm":
        return parametrizations.weight_norm(layer)
    if how == "spectral_norm":
        return parametrizations.spectral_norm(layer)
    if how == "strided":
        kept = layer.weight.detach()
        layer.weight = nn.Parameter(kept.transpose(0, 1).contiguous().transpose(0, 1))
    if how == "also data":
        return Apply(lambda m, x: m.layer(x) + m.layer.weight.mean() * 3, layer=layer)
    if how in ("standardised", "scaled") and getattr(layer, "padding_mode", "zeros") == "zeros":
        return Apply(_standardised if how == "standardised" else _scaled, layer=layer)
    return layer


def _called(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _standardised(m: Any, x: Tensor) -> Tensor:
    weight = m.layer.weight
    axes = tuple(range(1, weight.dim()))
    return _called(m.layer, x, (weight - weight.mean(axes, True)) / (weight.var(axes, keepdim=True) + 0.1))


def _scaled(m: Any, x: Tensor) -> Tensor:
    return _called(m.layer, x, m.layer.weight * 0.5 + 0.1)


def transposed(
    place: Place, out: int = 4, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = True
) -> Made:
    groups = math.gcd(groups, math.gcd(place.channels, out))
    if place.fixed or place.height > 12:
        kernel, stride = 3, 1
    inside = 1 if kernel == 3 else 0
    conv = nn.ConvTranspose2d(place.channels, out, kernel, stride, inside, 0, groups, bias)
    height, width = ((n - 1) * stride - 2 * inside + kernel for n in (place.height, place.width))
    return conv, replace(place, channels=out, height=height, width=width)


def linear(place: Place, out: int = 4, bias: bool = True, weight: str = "plain") -> Made:
    return weighted(nn.Linear(place.channels, out, bias), weight), replace(place, channels=out)


def token_linear(place: Place, bias: bool = True, turned: bool = True) -> Made:
    """A Linear over the tokens: between two transposes, or as a product from the left."""
    if turned:
        part = nn.Linear(place.tokens, place.tokens, bias)
        return Apply(lambda m, x: m.part(x.transpose(1, 2)).transpose(1, 2), part=part), place
    weight = nn.Parameter(torch.randn(place.tokens, place.tokens) / place.tokens**0.5)
    return Apply(lambda m, x: m.weight @ x, weight=weight), place


# Norms

STATISTICS = ("trained", "none", "batch", "written", "no affine", "frozen")


def batch_norm(place: Place, statistics: str = "trained", eps: float = 1e-5) -> Made:
    """`batch` uses the batch's own statistics in eval mode too, `written` also writes to the buffers."""
    kind = nn.BatchNorm2d if place.layout == "nchw" else nn.BatchNorm1d
    if statistics in ("none", "batch", "written") and len(place.shape) > 1 and place.tokens > 3:
        norm = kind(place.channels, eps, track_running_stats=statistics != "none")
        if statistics == "none":
            return norm, place
        return Apply(_held_in_training, norm=norm, written=statistics == "written"), place
    norm = kind(place.channels, eps, affine=statistics != "no affine")
    return (norm.requires_grad_(False) if statistics == "frozen" else norm), place


def _held_in_training(m: Any, x: Tensor) -> Tensor:
    n = m.norm
    kept = (n.running_mean, n.running_var) if m.written else (None, None)
    return F.batch_norm(x, *kept, n.weight, n.bias, True, 0.1, n.eps)


def layer_norm(place: Place, affine: bool = True, bias: bool = True) -> Made:
    """Over the channels where they are last, over a whole image of channels where they are first."""
    shape = place.shape if place.layout == "nchw" else (place.channels,)
    return nn.LayerNorm(shape, elementwise_affine=affine, bias=bias), place


def group_norm(place: Place, groups: int = 1, affine: bool = True) -> Made:
    groups = place.channels if groups == 0 else math.gcd(groups, place.channels)
    if place.tokens * place.channels // groups < 4:
        groups = 1
    return nn.GroupNorm(groups, place.channels, affine=affine), place


def rms_norm(place: Place, affine: bool = True) -> Made:
    return nn.RMSNorm(place.channels, eps=1e-5, elementwise_affine=affine), place


# Attention

ATTENTIONS = ("sdpa", "explicit", "query scaled", "no scale", "separate")


def attention(
    place: Place, heads: int = 2, how: str = "sdpa", normed: bool = False, bias: bool = True
) -> Made:
    c, heads = place.channels, math.gcd(heads, place.channels)
    if how == "separate":
        layers: Any = nn.ModuleList(nn.Linear(c, c, bias) for _ in range(3))
    else:
        layers = nn.Linear(c, 3 * c, bias)
    norms = nn.ModuleList(nn.LayerNorm(c // heads) if normed else nn.Identity() for _ in range(2))
    sizes = {"heads": heads, "tokens": place.tokens, "each": c // heads, "how": how}
    return Apply(_attend, layers=layers, norms=norms, proj=nn.Linear(c, c), **sizes), place


def _attend(m: Any, x: Tensor) -> Tensor:
    shape = (-1, m.tokens, m.heads, m.each)
    if m.how == "separate":
        q, k, v = (part(x).reshape(shape).transpose(1, 2) for part in m.layers)
    else:
        stacked = m.layers(x).reshape(x.shape[0], m.tokens, 3, m.heads, m.each)
        q, k, v = stacked.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = m.norms[0](q), m.norms[1](k)
    if m.how in ("sdpa", "separate"):
        x = F.scaled_dot_product_attention(q, k, v)
    else:
        scale = {"no scale": 1.0}.get(m.how, m.each**-0.5)
        weights = (q * scale) @ k.transpose(-2, -1) if m.how == "query scaled" else q @ k.mT * scale
        x = weights.softmax(-1) @ v
    return m.proj(x.transpose(1, 2).reshape(-1, m.tokens, m.heads * m.each))
