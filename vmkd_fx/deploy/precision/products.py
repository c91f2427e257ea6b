"""The matrix products and convolutions of an ONNX graph, and which of them eight bits spare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmkd_fx import __version__

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

RECURRENT = ("LSTM", "GRU", "RNN")
OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul", *RECURRENT)


@dataclass(frozen=True)
class Product:
    """A product of an ONNX graph.

    Attributes:
        name: of the node.
        operator: its type.
        weight: the constant among its operands; "" for a product of computed values.
        on_the_left: whether that is the first operand.
        kept: why it is not quantised; "" where it is.
    """

    name: str
    operator: str
    weight: str
    on_the_left: bool
    kept: str


def products_of(proto: ModelProto) -> list[Product]:
    """All products in their order."""
    nodes = [node for node in proto.graph.node if node.op_type in OPERATORS]
    constants = {tensor.name for tensor in proto.graph.initializer}
    first, last = _without_one_before(proto, nodes), _without_one_behind(proto, nodes)
    found = []
    for node in nodes:
        weights = [name for name in node.input[:2] if name in constants]
        reason = ""
        if node.op_type in RECURRENT:
            reason = "a recurrent layer"
        elif node.name in first:
            reason = "the first layer"
        elif node.name in last:
            reason = "the last layer"
        elif len(weights) != 1:
            reason = "a product of computed values"
        elif node.op_type == "ConvTranspose":
            reason = "a transposed convolution"
        weight = weights[0] if len(weights) == 1 else ""
        on_the_left = node.op_type in ("Gemm", "MatMul") and weight == node.input[0]
        found.append(Product(node.name, node.op_type, weight, on_the_left, reason))
    return found


def _without_one_before(proto: ModelProto, products: list[NodeProto]) -> set[str]:
    """The products that images reach through no other."""
    names = {node.name for node in products}
    behind = set()  # values that have a product before them
    for node in proto.graph.node:
        if node.name in names or any(name in behind for name in node.input):
            behind.update(node.output)
    return {node.name for node in products if not any(name in behind for name in node.input)}


def _without_one_behind(proto: ModelProto, products: list[NodeProto]) -> set[str]:
    """The products that reach the logits through no other."""
    names = {node.name for node in products}
    before = set()  # values that have a product behind them
    for node in reversed(proto.graph.node):
        if node.name in names or any(name in before for name in node.output):
            before.update(node.input)
    return {node.name for node in products if not any(name in before for name in node.output)}


def products_in_single(proto: ModelProto) -> tuple[str, ...]:
    """The products that compute in float32, and whose operands were not quantised, by name."""
    from onnx import TensorProto, shape_inference

    typed = shape_inference.infer_shapes(proto)
    types = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    types |= {value.name: value.type.tensor_type.elem_type for value in typed.graph.output}
    return tuple(
        node.name
        for node in proto.graph.node
        if node.op_type in (*OPERATORS, "Einsum")
        and any(types.get(name) == TensorProto.FLOAT for name in node.output)
    )


def unquantised(proto: ModelProto) -> tuple[str, ...]:
    """The products of which an operand does not come from a dequantisation, by name."""
    made = {output: node for node in proto.graph.node for output in node.output}

    def dequantised(name: str) -> bool:
        node = made.get(name)
        while node is not None and node.op_type in ("Transpose", "Reshape", "Cast"):
            node = made.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    return tuple(
        node.name
        for node in proto.graph.node
        if node.op_type in OPERATORS and not all(map(dequantised, node.input[:2]))
    )


def sign(proto: ModelProto, before: ModelProto) -> None:
    """Name this package as the producer, and keep of the notes those that the graph had before."""
    proto.producer_name, proto.producer_version = "vmkd-fx", __version__
    del proto.metadata_props[:]
    proto.metadata_props.extend(before.metadata_props)
