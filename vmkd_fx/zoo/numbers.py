"""The checks of one model on real numbers: both modes, taps, mixing, and the round trip after training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from vmkd_fx.distill.applies import applicability
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.layout import LOCATION_AXES
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.perturb import Perturbed
from vmkd_fx.graph.places import module_outputs
from vmkd_fx.graph.shapes import Shape, node_shapes
from vmkd_fx.graph.trace import trace
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import evaluating
from vmkd_fx.graph.verify import relative_error
from vmkd_fx.passes.feature_taps import tap
from vmkd_fx.passes.injections import inject
from vmkd_fx.passes.pipeline import strip
from vmkd_fx.zoo.agreement import features_of
from vmkd_fx.zoo.check import difference
from vmkd_fx.zoo.injections import injections

CHECKS = ("evaluation", "training", "taps", "mixing", "round trip")
TAPS = 1e-5
"""Relative: timm computes its features by other views of the same numbers."""

GRADIENTS = 1e-5
"""Relative: where several branches read one tensor, their gradients add up in the order of the nodes."""


def check_numbers(
    model: nn.Module,
    input_size: tuple[int, int, int] | None = None,
    only: Collection[str] = CHECKS,
    seed: int = 0,
) -> dict[str, str]:
    """For each check what differed; empty strings where nothing did. `model` is left as it was."""
    model = deepcopy(model)
    module = trace(model, input_size=input_size)
    size = module.info.need_input_size()
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(seed))
    known = anatomy(module)
    checks: dict[str, Callable[[], str]] = {
        "evaluation": lambda: _evaluation(model, module, images),
        "training": lambda: _training(model, images, seed),
        "taps": lambda: _taps(model, module, known, images),
        "mixing": lambda: _mixing(module, known),
        "round trip": lambda: _round_trip(model, known, images),
    }
    found = {}
    for name in only:
        try:
            found[name] = checks[name]()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def _evaluation(model: nn.Module, module: TracedModule, images: Tensor) -> str:
    with evaluating(model), evaluating(module), torch.no_grad():
        return _unequal("logits", model(images), module(images))


def _training(model: nn.Module, images: Tensor, seed: int) -> str:
    """Outputs, gradients and buffers of one step under the same random state."""
    results = []
    size = _size(images)
    for build in (lambda twin: twin, lambda twin: trace(twin, input_size=size)):
        twin = deepcopy(model)
        student = build(twin)
        student.train()
        torch.manual_seed(seed)
        output = student(images)
        output.square().mean().backward()
        gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        results.append((output.detach(), gradients, dict(twin.named_buffers())))
    (one, grads, buffers), (two, other_grads, other_buffers) = results
    if grads.keys() != other_grads.keys():
        return f"gradients of {sorted(grads.keys() ^ other_grads.keys())[0]}"
    differing = [_unequal("output", one, two)]
    differing += [
        f"gradient of {name} differs by {error:.2g}"
        for name in grads
        if (error := relative_error(grads[name], other_grads[name])) > GRADIENTS
    ]
    differing += [_unequal(f"buffer {name}", buffers[name], other_buffers[name]) for name in buffers]
    return next(filter(None, differing), "")


def _taps(model: nn.Module, module: TracedModule, known: Anatomy, images: Tensor) -> str:
    """timm's intermediate features against the values at their places in the graph."""
    features = features_of(model)
    if not features or not hasattr(model, "forward_intermediates"):
        return ""
    with evaluating(model), torch.no_grad():
        expected: list[Tensor] = model.forward_intermediates(  # type: ignore[operator]
            images, intermediates_only=True
        )
    outputs, shapes = module_outputs(module), node_shapes(module)
    leaving = [part.output for part in known.stages] + [part.output for part in known.blocks]
    fallback = {str(index): node for index, node in enumerate(leaving)}
    if len(expected) != len(features):
        return ""
    for index, (feature, value) in enumerate(zip(features, expected, strict=True)):
        node = outputs.get(feature["module"])
        places = {"0": node.name} if node is not None else fallback | _alike(shapes, value.shape)
        tapped = tap(module, places).eval()
        with torch.no_grad():
            found = [item for name, item in tapped(images).items() if name.startswith("taps/")]
        if not any(_same_feature(item, value) for item in found):
            return f"feature {index} of timm, {feature['module']}, has other values"
    return ""


def _alike(shapes: Mapping[Node, Shape], shape: torch.Size) -> dict[str, str]:
    """Every value of a feature's shape (B, C, H, W), as a map or as tokens with some in front, where
    timm names no module that is called.
    """
    batch, channels, height, width = shape
    tokens = [(batch, height * width + prefix, channels) for prefix in range(9)]
    fitting = {tuple(shape), (batch, height, width, channels), *tokens}
    return {n.name: n.name for n, found in shapes.items() if found in fitting and n.op != "get_attr"}


def _same_feature(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in any of the layouts and with or without prefix tokens."""
    candidates = [found]
    if found.ndim == 4:
        candidates.append(found.permute(0, 3, 1, 2))
    if found.ndim == 3 and expected.ndim == 4:
        height, width = expected.shape[2:]
        patches = found[:, -height * width :].transpose(1, 2)
        if patches.shape[:2] == expected.shape[:2] and patches.shape[2] == height * width:
            candidates.append(patches.unflatten(2, (height, width)))
            candidates.append(_in_order_of(patches, expected.flatten(2)).unflatten(2, (height, width)))
    return any(item.shape == expected.shape and relative_error(expected, item) <= TAPS for item in candidates)


def _in_order_of(tokens: Tensor, others: Tensor) -> Tensor:
    """The same tokens (B, C, N), put where their likes are in `others`: Hiera has an order of its own."""
    direction = torch.randn(tokens.shape[1], generator=torch.Generator().manual_seed(0))
    places = [torch.einsum("bcn,c->bn", item, direction).argsort(1) for item in (tokens, others)]
    index = torch.empty_like(places[0]).scatter_(1, places[1], places[0])
    return tokens.gather(2, index[:, None].expand_as(tokens))


def _mixing(module: TracedModule, known: Anatomy) -> str:
    """The analysis of every branch against what a change of one location shows."""
    branches = [b for block in known.blocks for b in block.branches if b.mixing.mixes is not None]
    programs = [(b.body, b.norm or b.stream, LOCATION_AXES[b.layout]) for b in branches]
    for branch, seen in zip(branches, Perturbed(module).mixes(programs), strict=True):
        if seen != branch.mixing.mixes:
            return f"{branch.end}: {branch.mixing} by analysis, {seen} by a change of one location"
    return ""


def _round_trip(model: nn.Module, known: Anatomy, images: Tensor) -> str:
    """Every injection that applies, three training steps, and out again."""
    plain = trace(model, input_size=_size(images))
    for name, edit in injections(plain, known, applicability(plain, known)).items():
        student = deepcopy(model)
        module = trace(student, input_size=_size(images))
        wrapped = inject(module, [edit], known)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            outputs: dict[str, Any] = wrapped.train()(images)
            sum(value.square().mean() for value in outputs.values()).backward()
            optimizer.step()
        student.train()  # some modules forget here what they computed from older weights
        stripped = strip(wrapped)
        if found := difference(stripped, module):
            return f"{name}: {found}"
        with evaluating(student), evaluating(stripped), torch.no_grad():
            if found := _unequal("logits", student(images), stripped(images)):
                return f"{name}: {found}"
    return ""


def _unequal(what: str, one: Tensor, two: Tensor) -> str:
    return "" if torch.equal(one, two) else f"{what} differs by {relative_error(one, two):.2g}"


def _size(images: Tensor) -> tuple[int, int, int]:
    channels, height, width = images.shape[1:]
    return channels, height, width
