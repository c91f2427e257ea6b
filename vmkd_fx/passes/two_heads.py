"""The two heads of a DeiT student as outputs, and out again (Touvron et al., 2021, section 4).

timm's distilled models answer in evaluation with the mean of a class head and a distillation head. In
training each has a loss of its own, so both leave beside the mean; nothing is added.
"""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.fx import Node

from vmkd_fx.errors import MatchError
from vmkd_fx.graph.edit import Injection, logits_node
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.traced import TracedModule, fork

NAME = "deit"
_SUMS = {operator.add, torch.add, "add"}
_QUOTIENTS = {operator.truediv, torch.div, "div"}


@dataclass(frozen=True)
class TwoHeadsConfig:
    """No settings."""


def inject_two_heads(
    module: TracedModule, config: TwoHeadsConfig, known: Anatomy | None = None
) -> TracedModule:
    """Add the outputs `deit/class` and `deit/dist`, each (B, classes); `strip` takes them out.

    Raises:
        MatchError: the logits are not the mean of two heads.
    """
    module = fork(module, to_edit=True)
    class_head, dist_head = two_heads(module)
    injection = Injection(module, NAME, asdict(config))
    injection.emit("class", class_head)
    injection.emit("dist", dist_head)
    return injection.finish()


def two_heads(module: TracedModule) -> tuple[Node, Node]:
    """The nodes of the class head and of the distillation head.

    Raises:
        MatchError: the logits are not the mean of two heads.
    """
    mean = logits_node(module)
    total = mean.args[0] if mean.target in _QUOTIENTS and mean.args[1:] == (2,) else None
    if isinstance(total, Node) and total.target in _SUMS:
        heads = [part for part in total.args[:2] if isinstance(part, Node) and _is_linear(module, part)]
        if len(heads) == 2:
            return heads[0], heads[1]
    raise MatchError(
        "DeiT's distillation needs a student whose logits are the mean of a class and a distillation head; "
        f"{module.info.name} has one head; take one of timm's 'deit*_distilled*' or 'levit*' models, or "
        "method 'hard'"
    )


def _is_linear(module: TracedModule, node: Node) -> bool:
    if node.op != "call_module":
        return False
    part = module.get_submodule(str(node.target))
    return isinstance(part, nn.Linear) or any(isinstance(inner, nn.Linear) for inner in part.modules())
