"""`trace`: any model as one torch.fx graph that is right in train() and in eval()."""

from __future__ import annotations

import traceback
from copy import deepcopy
from typing import Any

from torch import nn
from torch.fx import Graph

from vmkd_fx.errors import TraceError
from vmkd_fx.graph.info import model_info
from vmkd_fx.graph.modes import differing_modules, insert_mode_switches
from vmkd_fx.graph.receipt import PREFIX
from vmkd_fx.graph.share import shared_view, unwrapped
from vmkd_fx.graph.traced import Closed, TracedModule, fork
from vmkd_fx.graph.tracer import GraphTracer

_MOST_ROUNDS = 200


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
    if isinstance(model, TracedModule):
        traced = fork(model)
    else:
        traced = _trace(model)
        traced.meta["info"] = model_info(model)
    if input_size is not None:
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


def _trace(model: nn.Module) -> TracedModule:
    if reserved := [name for name, _ in model.named_modules() if name.split(".")[0] == PREFIX]:
        raise TraceError(
            f"{type(model).__name__} has a submodule {reserved[0]!r}, the name reserved for what passes add"
        )
    root = shared_view(model)
    modes = {path: module.training for path, module in root.named_modules()}
    closed: dict[str, str] = {}
    for _ in range(_MOST_ROUNDS):
        graphs = _both_modes(root, closed)
        if graphs is None:
            continue
        training, evaluation = graphs
        differing = differing_modules(training, evaluation)
        if not differing:
            break
        if "" in differing:
            raise TraceError(
                f"{type(model).__name__}.forward itself takes other steps in train() than in eval(), so that "
                "no one graph can serve both; move that choice into a submodule"
            )
        closed.update((path, "takes other steps in train() than in eval()") for path in differing)
    else:
        raise TraceError(f"{type(model).__name__}: no graph after closing {len(closed)} modules")
    for path, module in root.named_modules():
        module.training = modes.get(path, module.training)
    insert_mode_switches(root, training, evaluation)
    traced = TracedModule(root, training)
    traced.meta["closed"] = tuple(Closed(path, reason) for path, reason in sorted(closed.items()))
    return traced


def _both_modes(root: nn.Module, closed: dict[str, str]) -> tuple[Graph, Graph] | None:
    """The training and the evaluation graph, or None after one more module had to be closed."""
    graphs = []
    for mode in (True, False):
        root.train(mode)
        tracer = GraphTracer(closed)
        try:
            graphs.append(tracer.trace(root))
        except Exception as error:
            path = tracer.failed_in
            if not path or path in closed:
                raise TraceError(f"{type(root).__name__} cannot be traced: {_where(error)}") from error
            closed[path] = _where(error)
            return None
    return graphs[0], graphs[1]


def _where(error: Exception) -> str:
    """The error's message and the line of the model that raised it."""
    stack = traceback.extract_tb(error.__traceback__)
    frames = [f for f in stack if not any(part in f.filename for part in ("/torch/", "/vmkd_fx/graph/"))]
    place = (
        f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}: {frames[-1].line})"
        if frames
        else ""
    )
    return f"{error}{place}"
