"""Branches of random networks: sums, products and concatenations, and what is called twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.random_layers import Apply, Made, Place, chain

Branches = Sequence[Any]  # of lists of steps, which the builder makes

SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda x, y: x + y,
    "torch.add": lambda x, y: torch.add(x, y, alpha=0.7),
    "+=": lambda x, y: y.add_(x),
    "-": lambda x, y: x - y,
}


class _Joined(nn.Module):
    """Branches of one input, joined two at a time."""

    def __init__(self, branches: list[nn.Module], join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        y = self.branches[0](x)
        for branch in self.branches[1:]:
            y = self.join(y, branch(x))
        return y


def added(builder: Any, place: Place, branches: Branches, how: str = "+") -> Made:
    """A sum of branches; an empty one is the input itself, which an in-place sum may not write to."""
    made = [builder.kept(steps, place)[0] for steps in branches]
    if how == "+=":
        made = [chain(part, Apply(lambda m, x: x * 1.0)) for part in made]
    return _Joined(made, SUMS[how]), place


def residual(builder: Any, place: Place, branches: Branches, how: str = "+") -> Made:
    return added(builder, place, ((), branches[0]), how)


def product(builder: Any, place: Place, branches: Branches) -> Made:
    made = [chain(builder.kept(steps, place)[0], nn.Tanh()) for steps in branches]
    return _Joined([nn.Identity(), *made], lambda x, y: x * y), place


def concatenated(builder: Any, place: Place, branches: Branches) -> Made:
    made = [builder.kept(steps, place, channels=False) for steps in branches]
    channels = sum(after.channels for _, after in made)
    if channels > 16:
        made = [builder.kept(steps, place) for steps in branches[:2]]
        channels = 2 * place.channels
    if channels > 32:
        return nn.Identity(), place
    axis = place.axis
    joined = _Joined([part for part, _ in made], lambda x, y: torch.cat([x, y], axis))
    return joined, replace(place, channels=channels)


def split(builder: Any, place: Place, branches: Branches, how: str = "chunk") -> Made:
    """Half of the channels through each branch."""
    if place.channels % 2:
        return nn.Identity(), place
    half = replace(place, channels=place.channels // 2)
    parts = nn.ModuleList(builder.kept(steps, half)[0] for steps in branches)
    if any(getattr(part, "inplace", False) for part in parts.modules()):
        how = "slices"  # torch forbids to write to one of several views that one call made
    return Apply(_split, parts=parts, axis=place.axis, half=half.channels, how=how), place


def _split(m: Any, x: Tensor) -> Tensor:
    if m.how == "slices":
        halves: Any = (x.narrow(m.axis, 0, m.half), x.narrow(m.axis, m.half, m.half))
    else:
        halves = x.chunk(2, m.axis) if m.how == "chunk" else x.split(m.half, m.axis)
    return torch.cat([m.parts[0](halves[0]), m.parts[1](halves[1])], m.axis)


def twice(builder: Any, place: Place, branches: Branches, between: bool = True) -> Made:
    """One module called twice, on its own result."""
    body = builder.kept(branches[0], place)[0]
    return chain(body, nn.ReLU() if between else nn.Identity(), body), place


def gate(place: Place, middle: int = 2, hard: bool = False) -> Made:
    """Squeeze and excitation."""
    body = nn.Sequential(
        nn.Conv2d(place.channels, middle, 1),
        nn.ReLU(),
        nn.Conv2d(middle, place.channels, 1),
        nn.Hardsigmoid() if hard else nn.Sigmoid(),
    )
    return Apply(lambda m, x: x * m.body(x.mean((2, 3), keepdim=True)), body=body), place


def mixed(place: Place, out: int) -> nn.Module:
    """Another number of channels, in any layout."""
    if place.layout == "nchw":
        return nn.Conv2d(place.channels, out, 1)
    if place.layout == "ncl":
        return nn.Conv1d(place.channels, out, 1)
    return nn.Linear(place.channels, out)


BRANCHES = (
    "3x3 norm",
    "1x1 norm",
    "norm",
    "1x1",
    "3x3",
    "depthwise norm",
    "scaled",
    "average",
    "1x1 3x3",
    "5x5",
    "1x3",
    "even",
    "dilated",
    "reflect",
    "one-sided",
    "thinned",
    "relu",
    "turned",
)
"""Branches of one input that are summed; not all of them can become one convolution."""


def parallel(place: Place, names: tuple[str, ...] = ("3x3", "1x1"), out: int = 0, stride: int = 1) -> Made:
    """`out` 0 keeps the channels."""
    out = out or place.channels
    smallest = min(place.height, place.width)
    stride = 1 if place.fixed or smallest < 8 else stride
    if smallest < 5:
        names = tuple(name for name in names if "1x1" in name) or ("1x1",)
    branches = [_branch(name, replace(place, fixed=stride == 1), out, stride) for name in names]
    height, width = ((n - 1) // stride + 1 for n in (place.height, place.width))
    return _Joined(branches, lambda x, y: x + y), replace(place, channels=out, height=height, width=width)


def _branch(name: str, place: Place, out: int, stride: int) -> nn.Module:
    c, same = place.channels, stride == 1 and out == place.channels
    norm = nn.BatchNorm2d(out)
    if not same and name in ("norm", "scaled", "depthwise norm", "relu"):
        name = "1x1 norm"
    if name == "norm":
        return norm
    if name in ("scaled", "relu"):
        scale = Apply(lambda m, x: x * m.c, c=nn.Parameter(torch.rand(c, 1, 1) + 0.5))
        return nn.Sequential(scale, nn.ReLU()) if name == "relu" else scale
    if name == "1x1 3x3":
        body = nn.Conv2d(c, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, out, 3, stride, 1, bias=False)
        return nn.Sequential(*body)
    if name == "average":
        pool = nn.AvgPool2d(3, stride, 1)
        return nn.Sequential(nn.Conv2d(c, out, 1, bias=False), nn.BatchNorm2d(out), pool)
    if name == "thinned":
        body = nn.Conv2d(c, out, 3, padding=1)
        return nn.Sequential(body, Apply(lambda m, x: x[:, :, :: m.stride, :: m.stride], stride=stride))
    if name == "turned":  # a convolution of the image laid on its side is another convolution
        return Apply(lambda m, x: m.conv(x.mT).mT, conv=nn.Conv2d(c, out, (3, 1), stride, (1, 0)))
    if name == "1x3":
        return nn.Conv2d(c, out, (1, 3), stride, (0, 1))
    if name == "one-sided":
        pads = Apply(lambda m, x: nn.functional.pad(x, (2, 0, 2, 0)))
        return nn.Sequential(pads, nn.Conv2d(c, out, 3, stride))
    if name == "even":
        pads = Apply(lambda m, x: nn.functional.pad(x, (0, 1, 0, 1)))
        return nn.Sequential(pads, nn.Conv2d(c, out, 2, stride))
    kernel = {"1": 1, "5": 5}.get(name[0], 3)
    groups = c if name == "depthwise norm" else 1
    mode = "reflect" if name == "reflect" else "zeros"
    dilation = 2 if name == "dilated" else 1
    pad = dilation * (kernel // 2)
    conv = nn.Conv2d(c, out, kernel, stride, pad, dilation, groups, "norm" not in name, mode)
    return nn.Sequential(conv, norm) if "norm" in name else conv
