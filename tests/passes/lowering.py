"""One pass at a time on a private float64 graph, for the tests of passes."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

import vmkd_fx as vx
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.verify import logits_of, probe_images, randomise_, relative_error
from vmkd_fx.passes.cleanup.constants import CONSTANTS
from vmkd_fx.passes.evaluation import specialise_to_evaluation, tidied
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite
from vmkd_fx.target import parse_target


def normal(model: nn.Module, size: tuple[int, int, int] = (3, 32, 32)) -> TracedModule:
    """A private float64 copy with random parameters, in ATen operators."""
    module = randomise_(vx.trace(model, copy=True, input_size=size).double())
    return specialise_to_evaluation(module)[0]


@torch.no_grad()
def rewritten(
    module: TracedModule, *passes: LoweringPass, target: str = "onnxruntime"
) -> tuple[TracedModule, Rewrite]:
    """The graph after these passes, and the last one's record."""
    for lowering_pass in passes:
        module = fork(module, to_edit=True, throwaway=True)
        rewrite = Rewrite(module, parse_target(target))
        lowering_pass.run(rewrite)
        module.graph.lint()
        module = tidied(module)
    return module, rewrite


def lowered_by(
    model: nn.Module,
    *passes: LoweringPass,
    size: tuple[int, int, int] = (3, 32, 32),
    target: str = "onnxruntime",
) -> tuple[float, TracedModule, Rewrite]:
    """The error in float64 for batches of one and of three, the graph, and the last pass's record."""
    module = normal(model, size)
    result, rewrite = rewritten(module, CONSTANTS, *passes, target=target)
    errors = [
        relative_error(logits_of(module, images), logits_of(result, images))
        for images in (probe_images(module, batch) for batch in (1, 3))
    ]
    return max(errors), result, rewrite


def operators(module: TracedModule) -> Counter[str]:
    """How often each operator is called, by its name without the overload."""
    called = (node.target for node in module.graph.nodes if node.op == "call_function")
    return Counter(str(getattr(target, "overloadpacket", target)).removeprefix("aten.") for target in called)
