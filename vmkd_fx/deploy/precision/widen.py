"""A graph in half as the same graph in float32: rounded weights, no rounding on the way.

What an exporter makes of half precision cannot be judged by running it in half, for two runtimes round
differently by as much as a wrong operator might. Widened, both sides compute in float32 and must agree as
closely as any float32 graph. It also judges bfloat16, which ONNX Runtime has no kernels for on a processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.fx.node import map_aggregate

from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.passes.evaluation import tidied

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

_HALVES = (torch.float16, torch.bfloat16)


def in_half_precision(module: nn.Module) -> bool:
    """Whether `module` is a graph that holds weights in half or casts to it."""
    if not isinstance(module, TracedModule):
        return False
    named = (value for node in module.graph.nodes for value in (*node.args, *node.kwargs.values()))
    return any(value in _HALVES for value in named if isinstance(value, torch.dtype)) or any(
        tensor.dtype in _HALVES for tensor in (*module.parameters(), *module.buffers())
    )


def widened_module(module: TracedModule) -> TracedModule:
    """The graph with float32 wherever it names half, over its weights as they are rounded."""
    wide = fork(module, to_edit=True, throwaway=True)
    for node in wide.graph.nodes:
        node.args, node.kwargs = (map_aggregate(given, _wide) for given in (node.args, node.kwargs))
    for part in wide.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.dtype in _HALVES:
                part._parameters[name] = nn.Parameter(parameter.detach().float(), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.dtype in _HALVES:
                part._buffers[name] = buffer.float()
    return tidied(wide)


def widened_file(proto: ModelProto) -> ModelProto:
    """The ONNX graph with FLOAT wherever it says FLOAT16 or BFLOAT16."""
    from onnx import AttributeProto, ModelProto

    wide = ModelProto()
    wide.CopyFrom(proto)
    graphs: list[GraphProto] = [wide.graph]
    while graphs:
        graph = graphs.pop()
        for value in (*graph.input, *graph.output, *graph.value_info):
            kind = value.type.tensor_type
            kind.elem_type = _wide_type(kind.elem_type)
        for tensor in graph.initializer:
            _widen(tensor)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.TENSOR:
                    _widen(attribute.t)
                elif attribute.type == AttributeProto.GRAPH:
                    graphs.append(attribute.g)
                elif attribute.name in ("to", "dtype") and attribute.type == AttributeProto.INT:
                    attribute.i = _wide_type(attribute.i)
    return wide


def _wide(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in _HALVES else value


def _wide_type(kind: int) -> int:
    from onnx import TensorProto

    return TensorProto.FLOAT if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16) else kind


def _widen(tensor: TensorProto) -> None:
    from onnx import TensorProto, numpy_helper

    if tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        exact = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(exact, tensor.name))
