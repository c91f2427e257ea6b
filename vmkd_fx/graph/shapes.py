"""Shapes of every node and the multiply-adds of a whole graph, found on fake tensors: no memory, no
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch.utils.flop_counter import FlopCounterMode

from vmkd_fx.errors import ModelError
from vmkd_fx.graph.rules import Sized
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import NodeValues, evaluating, image_form, reference_tensor

Shape = tuple[int, ...]


def node_shapes(module: TracedModule, batch: int = 2) -> dict[Node, Shape]:
    """The shape of each node's value for a batch of images; nodes that hold no tensor are left out.

    Raises:
        ModelError: such images do not pass through the model.
    """
    size = module.info.need_input_size()
    values = NodeValues(module, (batch, *size))
    try:
        held = {node: values.of(node) for node in module.graph.nodes}
    except Exception as error:
        raise _do_not_pass(size, error) from error
    return {node: tuple(value.shape) for node, value in held.items() if isinstance(value, Sized)}


def multiply_adds(module: nn.Module, input_size: Shape) -> int:
    """Multiply-adds for one image.

    The counting rule of the papers' tables: Linear, Conv and matrix products count one a multiply-add,
    LayerNorm and GroupNorm five an element, everything else nothing.
    """
    with counting() as counter:
        _on_fake_images(module, module, input_size, 1)
    return counter.get_total_flops() // 2


def counting() -> FlopCounterMode:
    """Counts twice the multiply-adds of what runs inside it."""
    rules = {
        torch.ops.aten.native_layer_norm: _norm_operations,
        torch.ops.aten.native_group_norm: _norm_operations,
    }
    return FlopCounterMode(display=False, custom_mapping=rules)


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


def parameter_count(module: nn.Module) -> int:
    """Parameters, each shared one counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _norm_operations(x: Shape, *_: Any, **__: Any) -> int:
    """FlopCounterMode counts two a multiply-add."""
    return 2 * 5 * prod(x)


def _on_fake_images(run: Callable[[torch.Tensor], Any], module: nn.Module, size: Shape, batch: int) -> None:
    shape, dtype = image_form(module, size)
    device = reference_tensor(module).device
    try:
        with evaluating(module), FakeTensorMode(allow_non_fake_inputs=True):
            run(torch.empty(batch, *shape, dtype=dtype, device=device))
    except Exception as error:
        raise _do_not_pass(size, error) from error


def _do_not_pass(size: Shape, error: Exception) -> ModelError:
    return ModelError(f"images of size {tuple(size)} do not pass through the model: {error}")
