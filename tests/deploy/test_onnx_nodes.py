"""The nodes of a graph are read as the package onnx reads them, and each finds the module it came from."""

from __future__ import annotations

import random
from pathlib import Path

import onnx
import pytest
from onnx import helper

from vmkd_fx.deploy.onnx_nodes import TYPES, Graph, Node, read_graph
from vmkd_fx.errors import BuildError
from vmkd_fx.steps import Step

TEXT = """<ir_version: 10, opset_import: ["": 20, "local": 1]>
g (float16[b, 3, 8, 8] images) => (float16[b, 8, 8, 8] logits)
<float16[8, 3, 1, 1] weight = {ONES}, float16[8, 1, 1] scale = {TWOS}> {
  a = Conv<group = 1>(images, weight)
  r = Relu(a)
  c = Mul(r, scale)
  logits = Mul(c, scale)
}""".replace("ONES", ", ".join(["1"] * 24)).replace("TWOS", ", ".join(["2"] * 8))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    model = onnx.parser.parse_model(TEXT)
    called = {"weight": "stem.proj.weight", "scale": "shared.scale"}
    for index, node in enumerate(model.graph.node):
        node.name = f"n{index}"
        node.input[:] = [called.get(value, value) for value in node.input]
    for tensor in model.graph.initializer:
        tensor.name = called[tensor.name]
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_nodes_are_what_onnx_reads(exported: tuple[Path, Step]) -> None:
    graph, expected = read_graph(exported[0]), onnx.load(exported[0])
    assert graph.opset == 20
    assert len(graph.nodes) == len(expected.graph.node) > 20
    for node, other in zip(graph.nodes, expected.graph.node, strict=True):
        assert (node.name, node.operator, node.domain) == (other.name, other.op_type, other.domain)
        assert (node.inputs, node.outputs) == (tuple(other.input), tuple(other.output))
        whole = {a.name: a.i for a in other.attribute if a.type == onnx.AttributeProto.INT}
        assert whole.items() <= node.numbers.items()
    assert graph.weights == {tensor.name for tensor in expected.graph.initializer}
    values = (*expected.graph.input, *expected.graph.output, *expected.graph.value_info)
    types = {value.name: TYPES[value.type.tensor_type.elem_type] for value in values}
    types |= {tensor.name: TYPES[tensor.data_type] for tensor in expected.graph.initializer}
    assert graph.types == types


def test_types_and_negative_numbers(written: Path) -> None:
    graph = read_graph(written)
    assert graph.types["a"] == graph.types["stem.proj.weight"] == "HALF"
    node = helper.make_node("Softmax", ["x"], ["y"], axis=-1)
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [value], [result])), written)
    assert read_graph(written).nodes[0].numbers == {"axis": -1}


def test_where_a_node_of_a_traced_model_came_from(exported: tuple[Path, Step]) -> None:
    graph = read_graph(exported[0])
    places = [graph.where(node) for node in graph.nodes]
    assert places[0] == "stem.proj" and places[-1] == "head"
    assert "blocks.1.mlp_channels.act" in places


def test_where_a_node_of_a_lowered_graph_came_from(written: Path) -> None:
    graph = read_graph(written)
    conv, relu, first, second = graph.nodes
    assert graph.where(conv) == "stem.proj"
    # A weight that two nodes read names neither of them.
    assert graph.where(relu) == graph.where(first) == graph.where(second) == "after stem.proj"
    assert graph.find("n1") is relu and graph.find("nothing") is None


def test_a_graph_without_names_has_no_places() -> None:
    node = Node("", "Relu", ("x",), ("y",))
    assert Graph(20, (node,), {}, frozenset()).where(node) == ""


@pytest.mark.parametrize(
    "contents", [b"", b"no graph", b"\x08\x0a", b"\xff" * 40, b"\x3a\xff\xff\xff\xff\x0f"]
)
def test_what_is_no_onnx_model(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(contents)
    with pytest.raises(BuildError, match=r"m\.onnx is no ONNX model"):
        read_graph(tmp_path / "m.onnx")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be read: No such file"):
        read_graph(tmp_path / "m.onnx")


def test_spoiled_files_are_read_or_refused(written: Path) -> None:
    data = written.read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(400):
        spoiled = bytearray(data[: chance.randrange(1, len(data) + 1)])
        for _ in range(chance.randrange(3)):
            spoiled[chance.randrange(len(spoiled))] = chance.randrange(256)
        written.write_bytes(spoiled)
        try:
            graph = read_graph(written)
            for node in graph.nodes:
                graph.where(node)
        except BuildError:
            refused += 1
    assert refused > 100
