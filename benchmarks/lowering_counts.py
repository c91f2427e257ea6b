"""What a runtime is left to do: nodes of an ONNX graph, and bytes that it moves beside its products.

Both are counted after ONNX Runtime's extended optimiser, the last level that does not depend on the CPU.

**The rule for bytes**, for one image. Each node reads its inputs and writes its outputs once, constants
included; values that a node takes twice are read once. Shapes and types are those of a run. Then

- a matrix product or a convolution counts nothing, nor do what ONNX Runtime has fused into it (`PRODUCTS`);
- an operator that only gives the same bytes another shape, or asks for a shape, counts nothing
  (`VIEWS`): no runtime moves anything for it;
- `Slice` and `Gather` read as much as they give out, and their indices, not all that they take from;
- any other fused operator is one operator: `BiasGelu` reads an input and a bias and writes once, and a fused
  attention counts what enters and leaves it;
- control flow counts what enters and leaves it; its nodes are counted, their bytes are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from lowering_runtime import on_cpu, quiet_options, random_images
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto, numpy_helper
from onnxruntime import GraphOptimizationLevel

PRODUCTS = frozenset(
    {
        "MatMul",
        "Gemm",
        "FusedMatMul",
        "FusedGemm",
        "TransposeMatMul",
        "MatMulInteger",
        "QLinearMatMul",
        "Einsum",
        "Conv",
        "FusedConv",
        "NhwcFusedConv",
        "ConvInteger",
        "QLinearConv",
        "ConvTranspose",
        "ConvTransposeWithDynamicPads",
        "DeformConv",
    }
)
VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant"})
SELECTIONS = frozenset({"Slice", "Gather"})


def optimised(source: Path, path: Path) -> ModelProto:
    """The graph of `source` after ONNX Runtime's extended optimiser, also written to `path`."""
    options = quiet_options(GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
    options.optimized_model_filepath = str(path)
    on_cpu(source, options)
    return onnx.load(path)


def nodes(graph: GraphProto) -> int:
    """How many nodes there are, those of branches and loop bodies included."""
    return sum(1 + sum(nodes(inner) for inner in _subgraphs(node)) for node in graph.node)


def bytes_moved(model: ModelProto) -> int:
    """Bytes by the rule above, for one image; `model` stays as it is."""
    sizes = _sizes(model)
    return sum(_moved(node, sizes) for node in model.graph.node)


def _moved(node: NodeProto, sizes: dict[str, int]) -> int:
    if node.op_type in PRODUCTS or node.op_type in VIEWS:
        return 0
    written = sum(sizes[name] for name in node.output if name)
    inputs = [sizes[name] for name in dict.fromkeys(node.input) if name]
    if node.op_type in SELECTIONS:
        inputs[0] = min(inputs[0], written)
    return sum(inputs) + written


def _sizes(model: ModelProto) -> dict[str, int]:
    """The bytes of every value of the main graph, read off a run with every value as an output."""
    probe = ModelProto()
    probe.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output if name]
    del probe.graph.output[:]
    probe.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = on_cpu(probe.SerializeToString(), quiet_options(GraphOptimizationLevel.ORT_DISABLE_ALL))
    feed = random_images(session, batch=1)
    sizes = {name: image.nbytes for name, image in feed.items()}
    for constant in model.graph.initializer:
        sizes[constant.name] = numpy_helper.to_array(constant).nbytes
    for name, value in zip(names, session.run(names, feed), strict=True):
        sizes[name] = value.nbytes
    return sizes


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs
