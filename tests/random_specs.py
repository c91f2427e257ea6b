"""A random network as plain data, and the module that it stands for.

Every tree of steps is a network: a step that does not fit where it stands is brought there by a change of
layout, or left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests import random_branches, random_layers, random_maths
from tests.random_kinds import KINDS, Kind
from tests.random_layers import Made, Place, chain
from vmkd_fx.graph.verify import randomise_


@dataclass(frozen=True)
class Step:
    """One step of a network.

    Attributes:
        reuse: "share" calls an earlier module of the same kind that fits here; "tie" takes an earlier
            module's weight where the shapes agree.
    """

    kind: str
    options: tuple[tuple[str, Any], ...] = ()
    branches: tuple[tuple[Step, ...], ...] = ()
    reuse: str = ""

    def __repr__(self) -> str:
        words = [repr(self.kind), *(f"[{', '.join(map(repr, branch))}]" for branch in self.branches)]
        words += [f"{name}={value!r}" for name, value in self.options]
        words += [f"reuse={self.reuse!r}"] * bool(self.reuse)
        return f"step({', '.join(words)})"


def step(kind: str, *branches: Sequence[Step], reuse: str = "", **options: Any) -> Step:
    """A step as it prints."""
    return Step(kind, tuple(options.items()), tuple(map(tuple, branches)), reuse)


@dataclass(frozen=True)
class Net:
    """A network: image size, steps, head, and how its parameters are made.

    Attributes:
        tap: the place among the steps whose features a second head reads, or none.
        values: "random" norm parameters, "fresh" ones, or random ones with "zeros", of "negative" sign,
            or over "steep" and "flat" running variances.
    """

    size: tuple[int, int]
    steps: tuple[Step, ...]
    head: str = "mean"
    tap: int | None = None
    values: str = "random"
    dtype: torch.dtype = torch.float64
    channels_last: bool = False
    target: str = "torch"
    seed: int = 0

    def __repr__(self) -> str:
        changed = [f for f in fields(self)[2:] if getattr(self, f.name) != f.default]
        rest = "".join(f", {f.name}={getattr(self, f.name)!r}" for f in changed)
        return f"Net({self.size}, ({''.join(f'{part!r}, ' for part in self.steps)}){rest})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def build(self) -> nn.Module:
        """The network in eval mode; the same one every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            builder = Builder()
            place = Place("nchw", 3, *self.size)
            layers = []
            places = [place]
            for step in self.steps:
                layer, place = builder.made((step,), place)
                layers.append(layer)
                places.append(place)
            tap = None if self.tap is None else self.tap % len(places)
            model = _Network(layers, _head(self.head, place), tap, None if tap is None else places[tap])
            _fill(model, self.values, self.seed)
        model = model.to(self.dtype).eval()
        return model.to(memory_format=torch.channels_last) if self.channels_last else model


class Builder:
    """Makes the modules of steps, and remembers them for those that reuse one."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, Place], Made] = {}
        self.weights: dict[torch.Size, nn.Parameter] = {}
        self.turns = 0

    def made(self, steps: Sequence[Step], place: Place) -> Made:
        """The steps one after another."""
        parts: list[nn.Module] = []
        for step in steps:
            kind = KINDS[step.kind]
            if place.layout not in kind.layouts:
                layout = kind.layouts[0]
                if place.layout == "nc" or (place.fixed and place.prefix and layout in ("nchw", "nhwc")):
                    continue
                part, place = self.laid_out(place, layout)
                parts.append(part)
            part, place = self._one(step, kind, place)
            parts.append(part)
        return (nn.Sequential(*parts) if parts else nn.Identity()), place

    def laid_out(self, place: Place, layout: str) -> Made:
        self.turns += 1
        return random_maths.laid_out(place, layout, self.turns % 2)

    def kept(self, steps: Sequence[Step], place: Place, *, channels: bool = True) -> Made:
        """The steps in a branch: layout and sizes of the end are those of the start, and so are the channels
        unless they may differ.
        """
        if not steps:
            return nn.Identity(), place
        body, after = self.made(steps, replace(place, fixed=True))
        parts = [body]
        if after.layout != place.layout:
            part, after = self.laid_out(after, place.layout)
            parts.append(part)
        if channels and after.channels != place.channels:
            parts.append(random_branches.mixed(after, place.channels))
            after = replace(after, channels=place.channels)
        assert replace(after, fixed=False, channels=0) == replace(place, fixed=False, channels=0)
        return chain(*parts), replace(after, fixed=place.fixed)

    def _one(self, step: Step, kind: Kind, place: Place) -> Made:
        if step.reuse == "share" and (step.kind, place) in self.known:
            return self.known[step.kind, place]
        options = dict(step.options)
        if kind.branches[1]:
            made = kind.make(self, place, step.branches, **options)
        else:
            made = kind.make(place, **options)
        for part in made[0].modules():
            weight = part._parameters.get("weight")
            if weight is None or weight.dim() < 2:
                continue
            if step.reuse == "tie" and weight.shape in self.weights:
                part.weight = self.weights[weight.shape]
            self.weights.setdefault(weight.shape, weight)
        return self.known.setdefault((step.kind, place), made)


class _Network(nn.Module):
    def __init__(
        self, layers: list[nn.Module], head: nn.Module, tap: int | None, tapped: Place | None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = head
        self.tap = tap
        self.second = None if tapped is None else _head("mean", tapped)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features[-1]))
        logits = self.head(features[-1])
        return logits if self.tap is None else logits + self.second(features[self.tap])


HEADS = ("mean", "flatten", "normed", "hidden", "token")


def _head(how: str, place: Place) -> nn.Module:
    c, classes = place.channels, 5
    if place.layout == "nc":
        return nn.Linear(c, classes)
    if how == "flatten":
        size = c * place.tokens
        return nn.Sequential(nn.Flatten(), nn.Linear(size, classes))
    axes = tuple(i for i in range(1, len(place.shape) + 1) if i != place.axis)
    if how == "token" and place.layout == "nlc":
        pooled = random_layers.Apply(lambda m, x: x[:, 0])
    else:
        pooled = random_layers.Apply(lambda m, x: x.mean(axes))
    if how == "normed":
        return nn.Sequential(pooled, nn.LayerNorm(c), nn.Linear(c, classes))
    if how == "hidden":
        return nn.Sequential(pooled, nn.BatchNorm1d(c), nn.Linear(c, 6), nn.Linear(6, classes))
    return nn.Sequential(pooled, nn.Linear(c, classes))


VALUES = ("random", "zeros", "negative", "steep", "flat", "fresh")


@torch.no_grad()
def _fill(model: nn.Module, values: str, seed: int) -> None:
    if values == "fresh":
        return
    randomise_(model, seed)
    for part in model.modules():
        weight = part._parameters.get("weight")
        if weight is not None and weight.dim() == 1:
            if values == "zeros":
                weight[::2] = 0
            if values == "negative":
                weight[::2] *= -1
        variance = part._buffers.get("running_var")
        if variance is not None and values in ("steep", "flat"):
            variance[::2] *= 1e-3 if values == "steep" else 1e3
