"""What a student with heads for its teachers predicts, and how those heads stay for it.

| `predict` | STD (table 6) | CiT |
| --- | --- | --- |
| "class" | the class head | the class head (the paper) |
| "dist" | the mean of the distillation heads | the mean of the conv and the involution head |
| "mean" | the average of these two | the average of all three heads (the authors' code) |
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import torch

from vmkd_fx.errors import MatchError, UnknownNameError
from vmkd_fx.graph.edit import LOGITS, drop_dead_nodes, named_outputs, output_node, set_outputs
from vmkd_fx.graph.receipt import PREFIX
from vmkd_fx.graph.replace import within
from vmkd_fx.graph.traced import TracedModule, fork

PREDICTIONS = ("class", "mean", "dist")

_NUMBERED = "std/"
_NAMED = ("cit/conv", "cit/inv")


def teacher_heads(names: Iterable[str]) -> list[str]:
    """The heads for teachers among a student's outputs: `std/0`, `std/1`, ... or `cit/conv` and `cit/inv`."""
    names = list(names)
    numbered = [n for n in names if n.startswith(_NUMBERED) and n.removeprefix(_NUMBERED).isdigit()]
    return numbered or [name for name in _NAMED if name in names]


def predicted(outputs: Mapping[str, torch.Tensor], predict: str) -> torch.Tensor:
    """The logits (B, C) that a student's outputs stand for; without heads for teachers those of its class
    head.
    """
    (first, share), *rest = _shares(outputs, predict).items()
    total = outputs[first] if share == 1 else share * outputs[first]
    for name, share in rest:
        total = total + share * outputs[name]
    return total


def keep_as_prediction(module: TracedModule, predict: str) -> TracedModule:
    """Turn the heads into one prediction instead of taking them out.

    Returns:
        A new graph with one bare output of logits; whatever else training added is gone from it.

    Raises:
        MatchError: there are no heads for teachers.
    """
    module = fork(module, to_edit=True)
    outputs = named_outputs(module)
    if not teacher_heads(outputs):
        raise MatchError(
            f"predict={predict!r} needs distillation heads, and {module.info.name} has none; use 'class'"
        )
    graph, prediction = module.graph, None
    with graph.inserting_before(output_node(module)):
        for name, share in _shares(outputs, predict).items():
            term = graph.call_function(operator.mul, (outputs[name], share))
            both = (prediction, term)
            prediction = term if prediction is None else graph.call_function(operator.add, both)
    assert prediction is not None
    set_outputs(module, {"": prediction})
    module.meta["receipts"] = ()
    drop_dead_nodes(module)
    _drop_unused_additions(module)
    module.recompile()
    return module


def _shares(names: Iterable[str], predict: str) -> dict[str, float]:
    """How much of each output a prediction is made of; they sum to one."""
    if predict not in PREDICTIONS:
        raise UnknownNameError("prediction", predict, PREDICTIONS)
    heads = teacher_heads(names)
    if predict == "class" or not heads:
        return {LOGITS: 1.0}
    if predict == "dist":
        return dict.fromkeys(heads, 1 / len(heads))
    if heads[0] in _NAMED:
        return dict.fromkeys((LOGITS, *heads), 1 / (1 + len(heads)))
    return {LOGITS: 0.5, **dict.fromkeys(heads, 0.5 / len(heads))}


def _drop_unused_additions(module: TracedModule) -> None:
    """Remove what training added and no node reads any more, so that no weights of it are deployed."""
    read = [str(node.target) for node in module.graph.nodes if node.op in ("call_module", "get_attr")]
    for path in [name for name, _ in module.named_modules() if within(name, PREFIX)]:
        if not any(within(target, path) or within(path, target) for target in read):
            module.delete_submodule(path)
