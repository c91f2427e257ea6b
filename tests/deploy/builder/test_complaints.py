"""The library's complaints name the node and the module, and say what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

from tests.deploy.conftest import needs_builder
from vmkd_fx.deploy.builder.complaints import building, called, in_our_words, parsing
from vmkd_fx.deploy.onnx_nodes import Graph, Node, read_graph
from vmkd_fx.deploy.tensorrt import Network
from vmkd_fx.errors import BuildError
from vmkd_fx.target import Profile

CONV = Node("node_conv", "Conv", ("images", "stem.weight"), ("a",))
RELU = Node("node_relu", "Relu", ("a",), ("b",))
BARE = Node("", "DFT", ("b",), ("c",))
GRAPH = Graph(20, (CONV, RELU, BARE), {}, frozenset({"stem.weight"}))


@dataclass
class Complaint:
    """What a `ParserError` answers."""

    text: str
    name: str = ""
    operator: str = ""
    index: int = -1

    def desc(self) -> str:
        return self.text

    def node_name(self) -> str:
        return self.name

    def node_operator(self) -> str:
        return self.operator

    def node(self) -> int:
        return self.index


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (CONV, "node 'node_conv' (Conv) of stem"),
        (RELU, "node 'node_relu' (Relu) after stem"),
        (BARE, "node DFT after stem"),
    ],
)
def test_a_node_as_it_is_called(node: Node, text: str) -> None:
    assert called(node, GRAPH) == text


def test_a_parser_error_finds_its_node_by_name_or_number() -> None:
    plugin = 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"'
    words = "this version has no such operator"
    assert parsing([Complaint(plugin, "node_relu", "Relu", 7)], GRAPH).startswith("node 'node_relu' (Relu)")
    assert parsing([Complaint(plugin, "", "DFT", 2)], GRAPH) == f"node DFT after stem: {words}"
    assert parsing([Complaint(plugin, "", "DFT", 0)], GRAPH) == words  # the number is another node's
    assert parsing([], GRAPH) == "it gives no reason"


def test_a_builder_error_finds_the_node_it_names() -> None:
    message = "Error Code 1: Myelin ([pass.cpp:337] 'node_conv' for Turing (SM75): FP32 GEMM is not supported"
    assert building([message, message], GRAPH) == (
        "node 'node_conv' (Conv) of stem: sm75 takes matrix products in half precision only, and this one is "
        "in float32"
    )
    assert building([], GRAPH) == "it gives no reason"


def test_an_unknown_message_comes_without_its_source() -> None:
    message = "IBuilder::buildSerializedNetwork: Error Code 9: Sky fell. In fall at /_src/sky.cpp:12"
    assert in_our_words(message) == "Sky fell"


@needs_builder
@pytest.mark.engine
def test_the_real_parser_and_the_real_builder(tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["": 20]> g (float[b, 3, 8, 8] images) => (float[b, 8, 8, 2] logits)'
        "<float[2, 3, 1, 1] weight = {1, 1, 1, 1, 1, 1}> {"
        "a = Conv(images, weight)  last = Transpose<perm=[0, 2, 3, 1]>(a)  logits = DFT(last) }"
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "stem.weight"
    model.graph.node[2].name = "the_transform"
    onnx.save(model, tmp_path / "m.onnx")
    where = r"node 'the_transform' \(DFT\) after stem: this version has no such operator"
    with pytest.raises(BuildError, match=rf"cannot read .*m\.onnx: {where}"):
        Network("tensorrt-rtx", tmp_path / "m.onnx")
    text = text.replace("last = Transpose<perm=[0, 2, 3, 1]>(a)  logits = DFT(last)", "logits = MatMul(a, a)")
    model = onnx.parser.parse_model(text.replace("float[b, 8, 8, 2] logits", "float[b, 2, 8, 8] logits"))
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "stem.weight"
    model.graph.node[1].name = "the_product"
    onnx.save(model, tmp_path / "m.onnx")
    assert read_graph(tmp_path / "m.onnx").find("the_product") is not None
    with pytest.raises(BuildError, match=r"cannot build .*: node 'the_product' \(MatMul\) after stem: sm75"):
        Network("tensorrt-rtx", tmp_path / "m.onnx").build(Profile(), (75,), progress=False)
