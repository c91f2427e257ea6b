"""Shapes of every node and the multiply-adds of a whole graph, found on fake tensors: no memory, no
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.fx
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch.utils.flop_counter import FlopCounterMode

from vmkd_fx.errors import ModelError
from vmkd_fx.graph.traced import TracedModule

Shape = tuple[int, ...]


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module: TracedModule) -> None:
        super().__init__(module)
        self.shapes: dict[Node, Shape] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def node_shapes(module: TracedModule, batch: int = 2) -> dict[Node, Shape]:
    """The shape of each node's value for a batch of images; nodes that hold no tensor are left out."""
    recorder = _Recorder(module)
    _on_fake_images(recorder.run, module, module.info.need_input_size(), batch)
    return recorder.shapes


def multiply_adds(module: nn.Module, input_size: Shape) -> int:
    """Multiply-adds for one image.

    The counting rule of the papers' tables: Linear, Conv and matrix products count one a multiply-add,
    LayerNorm and GroupNorm five an element, everything else nothing.
    """
    rules = {
        torch.ops.aten.native_layer_norm: _norm_operations,
        torch.ops.aten.native_group_norm: _norm_operations,
    }
    counter = FlopCounterMode(display=False, custom_mapping=rules)
    with counter:
        _on_fake_images(module, module, input_size, 1)
    return counter.get_total_flops() // 2


def class_count(module: nn.Module, input_size: Shape) -> int:
    """The length of the logits that the module returns for images of this size.

    Raises:
        ModelError: such images do not pass, or what comes out are not logits (B, classes).
    """
    seen: list[Any] = []
    _on_fake_images(lambda images: seen.append(module(images)), module, input_size, 2)
    logits = seen[0]["logits"] if isinstance(seen[0], dict) and "logits" in seen[0] else seen[0]
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(
            f"{type(module).__name__} returns {found} for two images; a classifier returns (2, classes)"
        )
    return logits.shape[1]


def reference_tensor(module: nn.Module) -> torch.Tensor:
    """A tensor of the dtype and on the device that the module's images have: its first real parameter."""
    return next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))


def parameter_count(module: nn.Module) -> int:
    """Parameters, each shared one counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _norm_operations(x: Shape, *_: Any, **__: Any) -> int:
    """FlopCounterMode counts two a multiply-add."""
    return 2 * 5 * prod(x)


def _on_fake_images(run: Callable[[torch.Tensor], Any], module: nn.Module, size: Shape, batch: int) -> None:
    reference = reference_tensor(module)
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        with FakeTensorMode(allow_non_fake_inputs=True):
            run(torch.empty(batch, *size, dtype=reference.dtype, device=reference.device))
    except Exception as error:
        raise ModelError(f"images of size {tuple(size)} do not pass through the model: {error}") from error
    finally:
        for part, mode in modes.items():
            part.training = mode
