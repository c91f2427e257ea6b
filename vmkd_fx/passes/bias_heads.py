"""A head for each of CiT's two teachers, and out again: on the conv and the involution token where the
student has them, else on the pooled feature that its classifier reads (Mixer and ResNet, CiT table 4; the
paper does not say how, and this is ours).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from vmkd_fx.errors import MatchError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.edit import (
    Injection,
    logits_node,
    overwritten,
)
from vmkd_fx.graph.joins import DataFlow
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.replace import replacements
from vmkd_fx.graph.shapes import Shape, node_shapes
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.passes.bias_tokens import NAME, TOKENS, BiasTokenConfig, add_bias_tokens

HEADS = "cit"
"""Of the injection of the heads."""


@dataclass(frozen=True)
class BiasHeadConfig:
    """Settings of the heads: there are none to choose."""


class BiasHead(nn.Module):
    """One head: of one token of a sequence (B, N, C), or of a pooled feature (B, C) or (B, C, 1, 1).

    Args:
        token: which of the N; None for a pooled feature.
        normalise: with a LayerNorm of its own, for a sequence that no norm stands behind.
    """

    def __init__(
        self, channels: int, classes: int, token: int | None = None, normalise: bool = False
    ) -> None:
        super().__init__()
        self.token = token
        self.norm = nn.LayerNorm(channels, eps=1e-6) if normalise else nn.Identity()
        self.fc = nn.Linear(channels, classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1) if self.token is None else x[:, self.token]
        return self.fc(self.norm(x))


def inject_bias_tokens(
    module: TracedModule, config: BiasTokenConfig, known: Anatomy | None = None
) -> TracedModule:
    """Add both tokens and their heads: `add_bias_tokens`, then `inject_bias_heads`."""
    return inject_bias_heads(add_bias_tokens(module, config, known), BiasHeadConfig())


def inject_bias_heads(
    module: TracedModule, config: BiasHeadConfig, known: Anatomy | None = None
) -> TracedModule:
    """Add the head of each of the two teachers: on the final conv and involution token where
    `add_bias_tokens` put them, else on the pooled feature that the classifier reads. `known` is the module's
    anatomy as it is now.

    Returns:
        A graph over the same student with outputs `logits`, `cit/conv` and `cit/inv`, each (B, classes).

    Raises:
        MatchError: the student has no classifier, or none that reads one pooled feature.
    """
    known = known or anatomy(module)
    if not known.num_classes:
        raise MatchError(
            f"CiT's heads have as many classes as the student, and {known.model} has none (num_classes=0)"
        )
    module = fork(module, to_edit=True)
    shapes = node_shapes(module)
    injection = Injection(module, HEADS, asdict(config))
    has_tokens = any(made.name == NAME for made in replacements(module))
    if has_tokens:
        feature = next(node for node in module.graph.nodes if node.name == known.final)
        last = known.blocks[-1]
        first: int | None = last.prefix_tokens - len(TOKENS)
        normalise, channels = known.final == last.output, last.channels
    else:
        feature = _classifier_input(module, DataFlow(module, shapes))
        first, normalise, channels = None, False, shapes[feature][1]
    if overwritten(feature, module):
        feature = injection.keep(feature)
    reference = reference_tensor(module)
    for index, token in enumerate(TOKENS):
        place = None if first is None else first + index
        with reference.device:
            head = BiasHead(channels, known.num_classes, place, normalise).to(reference.dtype)
        injection.emit(token, injection.call(token, head, feature, after=feature))
    return injection.finish()


def _classifier_input(module: TracedModule, flow: DataFlow) -> Node:
    """The pooled feature (B, C) or (B, C, 1, 1) that the last layer before the logits reads.

    Raises:
        MatchError: there is no such layer, or what it reads is no pooled feature.
    """
    node, name = logits_node(module), module.info.name
    while True:
        data = [source for source in node.all_input_nodes if source in flow]
        if len(data) != 1:
            raise MatchError(
                f"CiT's heads read what the classifier of {name} reads, and {node.name}, behind it, puts "
                f"{len(data)} tensors together"
            )
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        is_layer = node.target in (F.linear, F.conv2d)
        if is_layer or (layer is not None and next(layer.parameters(), None) is not None):
            shape: Shape = flow.shapes.get(data[0], ())
            if len(shape) < 2 or any(length != 1 for length in shape[2:]):
                raise MatchError(
                    f"CiT's heads read the pooled feature (B, C) that the classifier of {name} reads, and "
                    f"{node.name} reads {shape or 'several tensors'}"
                )
            return data[0]
        node = data[0]
