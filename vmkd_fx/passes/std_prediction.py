"""What a student with distillation heads predicts (STD table 6), and how the heads stay for it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TypeVar

import torch

from vmkd_fx.errors import MatchError
from vmkd_fx.graph.edit import LOGITS, drop_dead_nodes, named_outputs, set_outputs
from vmkd_fx.graph.receipt import PREFIX
from vmkd_fx.graph.replace import within
from vmkd_fx.graph.traced import TracedModule, fork

NAME = "std"

Output = TypeVar("Output")


def heads_of(outputs: Mapping[str, Output]) -> list[Output]:
    """The distillation heads among a student's outputs, `std/0`, `std/1`, ..."""
    numbered = {name: name.removeprefix(f"{NAME}/") for name in outputs}
    return [outputs[name] for name, rest in numbered.items() if rest != name and rest.isdigit()]


def predicted(outputs: Mapping[str, torch.Tensor], predict: str) -> torch.Tensor:
    """The logits (B, C) that a student's outputs stand for (STD table 6).

    "class" is the class head, "dist" the mean of the distillation heads, "mean" the average of the two;
    without heads all three are the class head.
    """
    heads = heads_of(outputs)
    if predict == "class" or not heads:
        return outputs[LOGITS]
    mean = torch.stack(heads).mean(0)
    return mean if predict == "dist" else (outputs[LOGITS] + mean) / 2


def keep_as_prediction(module: TracedModule, predict: str) -> TracedModule:
    """Turn the heads into one prediction instead of taking them out (STD table 6).

    `predict` is "dist", the mean of the distillation heads, or "mean", the average of that and the class
    head. The result is a new graph with one bare output of logits; whatever else training added is gone from
    it.
    """
    module = fork(module)
    outputs = named_outputs(module)
    heads = heads_of(outputs)
    if not heads:
        raise MatchError(
            f"predict={predict!r} needs distillation heads, and {module.info.name} has none; use 'class'"
        )
    graph = module.graph
    with graph.inserting_before(next(node for node in graph.nodes if node.op == "output")):
        prediction = heads[0]
        for head in heads[1:]:
            prediction = graph.call_function(operator.add, (prediction, head))
        if len(heads) > 1:
            prediction = graph.call_function(operator.truediv, (prediction, len(heads)))
        if predict == "mean":
            prediction = graph.call_function(operator.add, (prediction, outputs[LOGITS]))
            prediction = graph.call_function(operator.truediv, (prediction, 2))
    set_outputs(module, {"": prediction})
    module.meta["receipts"] = ()
    drop_dead_nodes(module)
    _drop_unused_additions(module)
    module.recompile()
    return module


def _drop_unused_additions(module: TracedModule) -> None:
    """Remove what training added and no node reads any more, so that no weights of it are deployed."""
    read = [str(node.target) for node in module.graph.nodes if node.op in ("call_module", "get_attr")]
    for path in [name for name, _ in module.named_modules() if within(name, PREFIX)]:
        if not any(within(target, path) or within(path, target) for target in read):
            module.delete_submodule(path)
