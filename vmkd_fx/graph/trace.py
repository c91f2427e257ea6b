"""`trace`: any model as one torch.fx graph that is right in train() and in eval()."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph

from vmkd_fx.errors import TraceError
from vmkd_fx.graph.constants import install_constant
from vmkd_fx.graph.edit import owner
from vmkd_fx.graph.groups import depths
from vmkd_fx.graph.info import ModelInfo, model_info
from vmkd_fx.graph.modes import differing_parts, drop_unread, insert_mode_switches, switches_of
from vmkd_fx.graph.nodes import OWNER
from vmkd_fx.graph.receipt import PREFIX
from vmkd_fx.graph.share import INTERNAL, shared_view, unwrapped
from vmkd_fx.graph.traced import HELD, Closed, TracedModule, fork
from vmkd_fx.graph.tracer import TOOLS, GraphTracer

_MOST_ROUNDS = 200
_TAKEN = {*dir(TracedModule), "meta"} - {*dir(nn.Module)}


def trace(model: Any, *, copy: bool = False, input_size: tuple[int, int, int] | None = None) -> TracedModule:
    """Write `model` down as a graph over the same parameters.

    Args:
        model: a module, a traced module or a training task (whose student is taken).
        copy: give the graph parameters of its own.
        input_size: (C, H, W) of one image, where the model does not say.

    Returns:
        A `torch.fx.GraphModule` whose train() and eval() both compute what the model's do. Submodules that
        cannot be traced stay closed and are listed in `.closed`. `model` itself is left as it was: class,
        forward, modes, hooks, flags.

    Raises:
        TraceError: the outermost forward itself cannot be traced.
    """
    model = as_module(model)
    if copy:
        model = deepcopy(model)
    if not isinstance(model, TracedModule):
        info = model_info(model, input_size)
        traced = _trace(model, info)
        traced.meta["info"] = info
        return traced
    traced = fork(model)
    if input_size is not None:
        if traced.fixed_by and input_size[1:] != model.info.need_input_size()[1:]:
            raise TraceError(
                f"{model.info.name} was traced for images of {model.info.input_size}, and their size decides "
                f"in {traced.fixed_by[0]}; trace the model itself again with input_size={input_size}"
            )
        traced.meta["info"] = model_info(traced, input_size)
    return traced


def as_module(model: Any) -> nn.Module:
    """The student inside a training task, a data-parallel wrapper or a compiled module; a plain module as it
    is.
    """
    from timm.task import TrainingTask

    if isinstance(model, TrainingTask):
        model = model.get_trainable_module()
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"expected a torch.nn.Module, a traced module or a training task, got {type(model).__name__}"
        )
    return unwrapped(model)


def _trace(model: nn.Module, info: ModelInfo) -> TracedModule:
    if reserved := [name for name, _ in model.named_modules() if name.split(".")[0] == PREFIX]:
        raise TraceError(
            f"{type(model).__name__} has a submodule {reserved[0]!r}, the name reserved for what passes add"
        )
    if taken := sorted(_TAKEN & {*model._parameters, *model._buffers, *model._modules}):
        raise TraceError(
            f"{type(model).__name__} has a part {taken[0]!r}, which means something else in a traced module; "
            "wrap the model in another module or rename that part"
        )
    closed = {
        path: "has backward hooks"
        for path, part in model.named_modules()
        if path and (part._backward_hooks or part._backward_pre_hooks) and not GraphTracer().is_layer(part)
    }
    emptied: set[str] = set()
    for _ in range(_MOST_ROUNDS):
        traces = _both_modes(model, info, closed, emptied)
        if traces is None:
            continue
        training, evaluation = traces
        differing = differing_parts(training.graph, evaluation.graph)
        if not differing:
            break
        modules = dict(model.named_modules())
        if methods := [path for path in differing if path not in modules]:  # others may differ for their sake
            closed.update((path, "takes other steps in train() than in eval()") for path in methods)
            continue
        if cached := {path for path in differing if _caches(modules[path])} - emptied:
            emptied |= cached
            continue
        if "" in differing:
            raise TraceError(
                f"{type(model).__name__}.forward itself takes other steps in train() than in eval(), so that "
                "no one graph can serve both; move that choice into a submodule"
            )
        closed.update((path, "takes other steps in train() than in eval()") for path in differing)
    else:
        raise TraceError(f"{type(model).__name__}: no graph after closing {len(closed)} modules")
    return _finish(model, training, evaluation, closed)


def _both_modes(
    model: nn.Module, info: ModelInfo, closed: dict[str, str], emptied: set[str]
) -> tuple[GraphTracer, GraphTracer] | None:
    """The training and the evaluation trace, or None after one more module had to be closed.

    Each goes over a view of its own, for a forward may keep what it computed.
    """
    tracers = []
    constants: dict[str, Tensor] = {}
    for mode in (True, False):
        root = shared_view(model, throwaway=True)
        _empty_caches(root, emptied)
        _set_mode(root, mode)
        tracer = GraphTracer(closed, info.input_size, constants)
        try:
            tracer.trace(root)
        except Exception as error:
            path = tracer.failed_in or ""
            if not path or path in closed:
                raise TraceError(f"{type(model).__name__} cannot be traced: {_where(error)}") from error
            closed[path] = _where(error)
            return None
        drop_unread(tracer.graph)
        tracers.append(tracer)
    return tracers[0], tracers[1]


def _set_mode(root: nn.Module, mode: bool) -> None:
    """`root.train(mode)`, which may also freeze parameters; those are the model's own."""
    flags = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    root.train(mode)
    for parameter, flag in flags:
        if parameter.requires_grad is not flag:
            parameter.requires_grad_(flag)


def _held_modes(model: nn.Module, root: nn.Module) -> dict[bool, tuple[str, ...]]:
    """By mode, the paths of parts of `root` that the model's own `train(mode)` leaves in the other mode."""
    if type(model).train is nn.Module.train:
        return {}
    view = shared_view(model, throwaway=True)
    held = {}
    for mode in (True, False):
        _set_mode(view, mode)
        paths = [path for path, part in view.named_modules() if part.training is not mode]
        held[mode] = tuple(name for path in paths for name in (path, *switches_of(root, path)))
    return held


def _empty_caches(root: nn.Module, paths: Iterable[str]) -> None:
    for path in paths:
        part = root.get_submodule(path)
        vars(part).update({name: {} for name in _caches(part)})


def _caches(module: nn.Module) -> list[str]:
    """Names of the dictionaries in which a module's forward keeps tensors."""
    return [
        name
        for name, value in vars(module).items()
        if name not in INTERNAL
        and type(value) is dict
        and value
        and all(isinstance(item, Tensor) and not isinstance(item, nn.Parameter) for item in value.values())
    ]


def _finish(
    model: nn.Module,
    training: GraphTracer,
    evaluation: GraphTracer,
    closed: dict[str, str],
) -> TracedModule:
    root = shared_view(model)
    _empty_caches(root, ["", *training.calls])  # no node reads them
    graph = training.graph
    for node in graph.nodes:
        node.meta[OWNER] = owner(node)
    fixed_by = tuple(dict.fromkeys((*training.fixed_by, *evaluation.fixed_by)))
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for path in sorted(read & training.constants.keys()):
        install_constant(root, path, training.constants[path])
    insert_mode_switches(root, graph, evaluation.graph)
    if fixed_by:
        _hold_size(graph, training.size or (), fixed_by)
    for node in graph.nodes:
        node.meta[OWNER] = owner(node)
    traced = TracedModule(root, graph)
    if held := _held_modes(model, root):
        traced.meta[HELD] = held
    traced.meta["closed"] = tuple(Closed(path, reason) for path, reason in sorted(closed.items()))
    traced.meta["calls"] = training.calls
    traced.meta["fixed_by"] = fixed_by
    traced.meta["depths"] = depths(model)
    return traced


def _hold_size(graph: Graph, size: tuple[int, ...], fixed_by: tuple[str, ...]) -> None:
    """Assert at the head of the graph that images have the height and width which decided its course."""
    images = next(node for node in graph.nodes if node.op == "placeholder")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    message = (
        f"this graph is for images of {size[1]} x {size[2]}, for their size decides in {fixed_by[0]}; "
        "trace the model again for another: trace(model, input_size=(channels, height, width))"
    )
    with graph.inserting_before(first):
        shape = graph.call_function(getattr, (images, "shape"))
        found = graph.call_function(operator.getitem, (shape, slice(-2, None)))
        same = graph.call_function(operator.eq, (found, tuple(size[1:])))
        graph.call_function(torch._assert, (same, message))


def _where(error: Exception) -> str:
    """The error's message and the line of the model that raised it."""
    stack = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in stack if not frame.filename.startswith(TOOLS)]
    place = (
        f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}: {frames[-1].line})"
        if frames
        else ""
    )
    return f"{error}{place}"
