"""What an engine's builder made of a precision, read back and held against what was asked.

A builder that ignores a request says nothing. So the parsed network is asked for the type of every product,
norm and softmax, before anything is built: matrix products and convolutions have the precision that was asked
for (in eight bits: both operands come from a dequantisation), norms and softmax are float32. Where a GPU is,
the inspector of the finished engine is asked as well, for there the builder has chosen its kernels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vmkd_fx.deploy.precision.asked import Asked
from vmkd_fx.errors import BuildError

_PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM")
_IN_SINGLE = ("NORMALIZATION", "SOFTMAX")
_MOVES = ("SHUFFLE", "IDENTITY", "CAST")
_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "mixed": "HALF", "bf16": "BF16"}
_QUANTISED = {"int8": "INT8", "fp8": "FP8"}


@dataclass(frozen=True)
class Layer:
    """A layer of a parsed network.

    Attributes:
        node: the ONNX node it was made for.
        kind: its type, as in "MATRIX_MULTIPLY".
        dtype: of its first output, as in "HALF".
        operands: of each input, the type that it was dequantised from; "" where it was not.
    """

    node: str
    kind: str
    dtype: str
    operands: tuple[str, ...] = ()


def read_layers(network: Any) -> list[Layer]:
    """The layers of a TensorRT or TensorRT-RTX network, in order."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    made = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    found, node = [], ""
    for layer in layers:
        node = _node(layer) or node  # the parser names not all that it makes for an LSTM, one after the other
        if layer.num_outputs:
            dtype = layer.get_output(0).dtype.name
            found.append(Layer(node or layer.name, layer.type.name, dtype, _operands(layer, made)))
    return found


def hold_to(layers: Sequence[Layer], asked: Asked, builder: str) -> str:
    """What was read, in words, if it is what was asked for.

    Args:
        asked: the precision, and the ONNX nodes of the products that stay float32.
        builder: package and version, for the message.

    Raises:
        BuildError: it is not; names the layers.
    """
    faults = [fault for layer in layers if (fault := _fault(layer, asked))]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise BuildError(
            f"{builder} did not make {asked.precision} of the graph: {'; '.join(faults[:8])}{more}. "
            "Nothing was built; deploy the model again with this version, or in another precision"
        )
    products = [layer for layer in layers if layer.kind in _PRODUCTS]
    kept = sum(layer.node in asked.kept for layer in products)
    return f"{len(products) - kept} products read back as {asked.precision}, {kept} spared"


def inspected_types(engine: Any, trt: Any) -> dict[str, int]:
    """How many outputs of layers have which type in a deserialised engine, by its inspector; needs a GPU.

    The engine must have been built with detailed profiling; else the inspector knows names alone, and the
    result is empty.

    Args:
        trt: the package that the engine belongs to.
    """
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    counts: dict[str, int] = {}
    for layer in json.loads(text).get("Layers", []):
        outputs = layer.get("Outputs", []) if isinstance(layer, dict) else []
        for output in outputs:
            kind = str(output.get("Format/Datatype") or output.get("Datatype") or "unknown")
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def _fault(layer: Layer, asked: Asked) -> str:
    """What is wrong with a layer, or ""."""
    if layer.kind in _IN_SINGLE:
        return "" if layer.dtype == "FLOAT" else f"{layer.node} ({layer.kind}) is {layer.dtype}, not FLOAT"
    if layer.kind not in _PRODUCTS:
        return ""
    wanted = _QUANTISED.get(asked.precision)
    if layer.node in asked.kept:
        others = ("FLOAT",) if wanted is None else ("FLOAT", "HALF")
        right = layer.dtype in others and not any(layer.operands)
        return "" if right else f"{layer.node} ({layer.kind}) is {_words(layer)}, and was to be spared"
    if wanted is None:
        wanted = _TYPES[asked.precision]
        right = layer.dtype == wanted and not any(layer.operands)
    else:
        right = len(layer.operands) > 1 and all(operand == wanted for operand in layer.operands[:2])
    return "" if right else f"{layer.node} ({layer.kind}) is {_words(layer)}, not {wanted}"


def _words(layer: Layer) -> str:
    operands = "/".join(operand or "not quantised" for operand in layer.operands)
    return f"{layer.dtype} of {operands} operands" if any(layer.operands) else layer.dtype


def _node(layer: Any) -> str:
    found = re.search(r"\[ONNX Layer: (.+?)\]", getattr(layer, "metadata", "") or "")
    return found.group(1) if found else ""


def _operands(layer: Any, made: dict[str, Any]) -> tuple[str, ...]:
    """The types that the inputs of a product were dequantised from."""
    if layer.type.name not in _PRODUCTS:
        return ()
    return tuple(_dequantised(layer.get_input(index), made) for index in range(layer.num_inputs))


def _dequantised(tensor: Any, made: dict[str, Any]) -> str:
    layer = made.get(tensor.name) if tensor is not None else None
    while layer is not None and layer.type.name in _MOVES:
        layer = made.get(layer.get_input(0).name)
    if layer is None or layer.type.name != "DEQUANTIZE":
        return ""
    return str(layer.get_input(0).dtype.name)
