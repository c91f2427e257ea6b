"""What is promised for any timm model, checked on one: traced, understood, injected, given back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import timm
import torch
from timm.models import get_arch_name, is_model
from torch import nn

from vmkd_fx.distill.applies import applicability
from vmkd_fx.errors import VmkdError
from vmkd_fx.graph.anatomy import read_anatomy
from vmkd_fx.graph.edit import logits_node
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.shapes import Shape, node_shapes, parameter_count
from vmkd_fx.graph.trace import trace
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import attribute
from vmkd_fx.passes.injections import Injected, inject
from vmkd_fx.passes.pipeline import strip
from vmkd_fx.zoo.agreement import disagreement
from vmkd_fx.zoo.injections import injections
from vmkd_fx.zoo.row import Row

_LAYERS = (
    *(nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm),
    nn.RMSNorm,
)

CLASSES = 1000
"""Given to a model that timm makes without a classifier, for a student has one."""


def check(name: str) -> Row:
    """The structure of one model, on the meta device: no memory, no arithmetic.

    Whatever goes wrong is a finding in the row, never an exception.
    """
    row = Row(name, family(name))
    try:
        with _timed(row, "create"), torch.device("meta"):
            model = timm.create_model(name)
            if getattr(model, "num_classes", None) == 0:
                model = timm.create_model(name, num_classes=CLASSES)
    except Exception as error:
        row.trace = f"timm cannot create it: {_brief(error)}"
        return row
    row.parameters = parameter_count(model)
    try:
        with _timed(row, "trace"):
            module = trace(model)
        row.nodes = len(module.graph.nodes)
        row.closed = [(part.path, part.reason) for part in module.closed if _matters(module, part.path)]
        row.fixed_size = module.fixed_by[0] if module.fixed_by else ""
        row.open_share = open_share(module)
        with _timed(row, "anatomy"):
            shapes = node_shapes(module)
            known = read_anatomy(module, shapes)
        row.trace = _runs(module, shapes[logits_node(module)])
    except Exception as error:
        row.trace = _brief(error)
        return row
    row.blocks, row.stages = len(known.blocks), len(known.stages)
    row.unclear = sum(branch.mixing.mixes is None for block in known.blocks for branch in block.branches)
    row.timm = disagreement(model, module, shapes, known)
    row.methods = {method: reason or "" for method, reason in applicability(module, known).items()}
    with _timed(row, "round trip"):
        row.round_trip = _round_trip(module, known, injections(module, known, row.methods))
    return row


def family(name: str) -> str:
    """The module of timm that a model comes from."""
    entry = timm.model_entrypoint(get_arch_name(name)) if is_model(name) else None
    return entry.__module__.rpartition(".")[2] if entry else ""


def open_share(module: TracedModule) -> float:
    """Of the parameters in Linear, convolution and norm layers that the graph uses, the share in open nodes.

    A layer is open when it is a node of its own, or when nodes read its parameters.
    """
    modules = dict(module.named_modules())
    layers = {id(p) for part in modules.values() if isinstance(part, _LAYERS) for p in part.parameters()}
    sizes: dict[int, int] = {}
    opened: set[int] = set()
    for node in module.graph.nodes:
        part = modules.get(str(node.target)) if node.op == "call_module" else None
        inside = list(part.parameters()) if part is not None else []
        if node.op == "get_attr" and isinstance(value := attribute(module, str(node.target)), nn.Parameter):
            inside = [value]
        sizes.update({id(p): p.numel() for p in inside if id(p) in layers})
        if node.op == "get_attr" or isinstance(part, _LAYERS):
            opened |= {id(p) for p in inside}
    total = sum(sizes.values())
    return sum(size for key, size in sizes.items() if key in opened) / total if total else 1.0


def difference(stripped: TracedModule, module: TracedModule) -> str:
    """What `strip` did not give back of `module`; empty where it gave all."""
    if stripped.code != module.code:
        return "the code of the graph differs"
    if list(stripped.state_dict()) != list(module.state_dict()):
        return "the keys of the state dict differ"
    same = [id(p) for p in stripped.parameters()] == [id(p) for p in module.parameters()]
    return "" if same else "other parameters"


def _round_trip(module: TracedModule, known: Anatomy, edits: Mapping[str, Injected]) -> dict[str, str]:
    """For each injection what `strip` did not give back, empty where it gave all.

    One goes on top of the other, as in a training; each is tried alone where that fails.
    """
    try:
        lost = difference(strip(inject(module, edits.values(), known)), module)
    except Exception as error:
        lost = _brief(error)
    if not lost or len(edits) == 1:
        return dict.fromkeys(edits, lost)
    alone = {name: _round_trip(module, known, {name: edit})[name] for name, edit in edits.items()}
    return alone if any(alone.values()) else dict.fromkeys(edits, f"one on top of the other: {lost}")


def _runs(module: TracedModule, expected: Shape) -> str:
    """What is wrong with what the graph returns in training; empty where it has the shape that the anatomy
    found in evaluation.
    """
    images = torch.empty(2, *module.info.need_input_size(), device="meta")
    with torch.no_grad():
        found = module.train()(images)
    right = isinstance(found, torch.Tensor) and tuple(found.shape) == expected
    return "" if right else f"in training it returns {_kind(found)}, in evaluation {expected}"


def _kind(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def _matters(module: TracedModule, path: str) -> bool:
    """Whether a closed module has parameters, or was closed for another reason than its mode."""
    reason = next(part.reason for part in module.closed if part.path == path)
    part = attribute(module, path)
    held = isinstance(part, nn.Module) and next(part.parameters(), None) is not None
    return held or "takes other steps" not in reason


@contextmanager
def _timed(row: Row, what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    row.seconds[what] = round(time.perf_counter() - started, 3)


def _brief(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    return first if isinstance(error, VmkdError) else f"{type(error).__name__}: {first}"
