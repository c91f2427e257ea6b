"""The hazard table is sound, its detectors find what they name alone, and the builder really does it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests.deploy.conftest import needs_builder
from vmkd_fx.deploy.builder.hazard_table import HAZARDS, REFUSED, WARNING, Hazard
from vmkd_fx.deploy.builder.hazards import PATTERNS, could_meet, met, refusals, refuse
from vmkd_fx.deploy.builder.names import OLDEST
from vmkd_fx.deploy.engine import build, known_hazards
from vmkd_fx.deploy.onnx_nodes import Graph, read_graph
from vmkd_fx.deploy.tensorrt import Network
from vmkd_fx.errors import BuildError
from vmkd_fx.target import Profile

RTX, TENSORRT = "tensorrt-rtx", "tensorrt"
NEWEST = (99,)

# A graph for each pattern, and one beside it that comes close and is harmless: (opset, text).
GROUP_NORM = (
    "g (float[b,8,4,4] x, float[8] s, float[8] t) => (float[b,8,4,4] y)"
    "{ y = GroupNormalization<num_groups=%d>(x, s, t) }"
)
ATTENTION = (
    "g (%s[b,2,64,64] x) => (%s[b,2,64,64] y) {{ q = Relu(x) k = Neg(x) v = Sqrt(x) y = Attention(%s) }}"
)
QUANTISED = (
    "g (float[b,4] x) => (float[b,4] y) <float s = {0.1}, %s z = {%d}>"
    "{ u = QuantizeLinear(x, s, z) y = DequantizeLinear(u, s, z) }"
)
RESIDUAL = (
    "g (%s[b,4,4,4] x, %s[4,4,1,1] w) => (%s[b,8,4,4] y)"
    "{ a = Neg(x) u = Conv(a, w) v = Relu(u) t = Add(v, %s) y = Concat<axis=1>(a, t) }"
)


def attention(kind: str, reads: str) -> tuple[int, str]:
    return 23, ATTENTION.replace("{{", "{").replace("}}", "}") % (kind, kind, reads)


def unary(operator: str, kind: str) -> str:
    return f"g ({kind}[b,4,8] x) => ({kind}[b,4,8] y) {{ y = {operator}(x) }}"


def layer_norm(kind: str) -> tuple[int, str]:
    return 20, (
        f"g ({kind}[b,4,8] x, {kind}[8] s) => ({kind}[b,4,8] y) {{ y = LayerNormalization<axis=-1>(x, s) }}"
    )


def product(kind: str) -> tuple[int, str]:
    return 20, f"g ({kind}[b,4,4] x) => ({kind}[b,4,4] y) {{ y = MatMul(x, x) }}"


SAMPLES: dict[str, tuple[tuple[int, str], tuple[int, str]]] = {
    "quantisation_to_uint8": ((20, QUANTISED % ("uint8", 0)), (20, QUANTISED % ("int8", 0))),
    "attention": (attention("float16", "q, k, v"), (20, unary("Softmax", "float16"))),
    "attention_in_float": (attention("float", "q, k, v"), attention("float16", "q, k, v")),
    "attention_of_one_tensor": (attention("float16", "x, x, x"), attention("float16", "q, k, v")),
    "col2im": (
        (
            18,
            "g (float[b,12,16] x) => (float[b,3,5,5] y) <int64[2] i = {5,5}, int64[2] k = {2,2}>"
            "{ y = Col2Im(x, i, k) }",
        ),
        (20, unary("Relu", "float")),
    ),
    "dft": (
        (20, "g (float[b,8,8,2] x) => (float[b,8,8,2] y) { y = DFT(x) }"),
        (20, unary("Relu", "float")),
    ),
    "group_norm_of_one_group": ((21, GROUP_NORM % 1), (21, GROUP_NORM % 2)),
    "group_norm_of_opset_21": ((21, GROUP_NORM % 2), (18, GROUP_NORM % 2)),
    "layer_norm_in_half": (layer_norm("float16"), layer_norm("float")),
    "opset_above_20": ((21, unary("Relu", "float")), (20, unary("Relu", "float"))),
    "opset_above_24": ((25, unary("Relu", "float")), (24, unary("Relu", "float"))),
    "products_not_in_half": (product("float"), product("float16")),
    "residual_of_concatenated": (
        (20, RESIDUAL % ("float16", "float16", "float16", "a")),
        (20, RESIDUAL % ("float16", "float16", "float16", "x")),
    ),
    "rms_normalization": (
        (23, "g (float[b,4,8] x, float[8] s) => (float[b,4,8] y) { y = RMSNormalization(x, s) }"),
        layer_norm("float"),
    ),
    "softmax_in_half": ((20, unary("Softmax", "bfloat16")), (20, unary("Softmax", "float"))),
}


def written(sample: tuple[int, str], path: Path) -> Path:
    opset, text = sample
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def graph_of(sample: tuple[int, str], tmp_path: Path) -> Graph:
    return read_graph(written(sample, tmp_path / "m.onnx"))


def test_every_pattern_has_a_sample_and_a_hazard() -> None:
    assert set(SAMPLES) == set(PATTERNS) == {hazard.pattern for hazard in HAZARDS}


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_a_detector_finds_what_it_names_alone(pattern: str, tmp_path: Path) -> None:
    bad, harmless = SAMPLES[pattern]
    assert PATTERNS[pattern](graph_of(bad, tmp_path))
    assert not PATTERNS[pattern](graph_of(harmless, tmp_path))


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda h: f"{h.kind} {h.name}".replace(" ", "-"))
def test_a_hazard_says_what_whoever_meets_it_needs(hazard: Hazard) -> None:
    assert hazard.kind in OLDEST and hazard.answer in (REFUSED, WARNING)
    assert hazard.before is None or hazard.since < hazard.before
    assert hazard.what and hazard.mend
    assert re.search(r"#\d+|measured|changelog|release notes|docs/|guide", hazard.reference)


def test_versions_begin_and_end(tmp_path: Path) -> None:
    graph = graph_of(SAMPLES["dft"][0], tmp_path)
    (found,) = met(graph, TENSORRT, (11, 1, 0, 106))
    assert found.hazard.versions == "10.0 to below 11.2"
    assert met(graph, TENSORRT, (11, 2)) == ()
    assert met(graph, TENSORRT, (9, 3)) == ()
    assert [item.hazard.versions for item in met(graph, RTX, NEWEST)] == ["1.0 and later"]


def test_a_hazard_of_some_gpus_is_met_for_those(tmp_path: Path) -> None:
    graph = graph_of(SAMPLES["products_not_in_half"][0], tmp_path)
    assert met(graph, RTX, (1, 7), (86, 89)) == ()
    (found,) = met(graph, RTX, (1, 7), (75, 86))
    with pytest.raises(BuildError, match=r"at y \(MatMul\): .*sm75 takes matrix products in half"):
        refuse([found], "TensorRT-RTX 1.7")
    assert could_meet(graph) == ()  # the target alone decides it


def test_a_warning_is_handed_on_and_not_refused(tmp_path: Path) -> None:
    found = met(graph_of(SAMPLES["layer_norm_in_half"][0], tmp_path), RTX, (1, 7))
    refuse(found, "TensorRT-RTX 1.7")
    (left,) = refusals(found)
    assert left.node == "y (LayerNormalization)"
    assert left.reason.startswith("layer norm in half precision: ") and "#2709" in left.reason


def test_a_bundle_says_what_any_version_could_meet(tmp_path: Path) -> None:
    path = written(SAMPLES["layer_norm_in_half"][0], tmp_path / "m.onnx")
    assert {(h.package, h.versions) for h in known_hazards(path)} == {
        ("TensorRT", "10.0 and later"),
        ("TensorRT-RTX", "1.0 and later"),
    }


@needs_builder
@pytest.mark.engine
@pytest.mark.parametrize(
    "pattern", ["attention_in_float", "attention_of_one_tensor", "col2im", "dft", "group_norm_of_one_group"]
)
def test_a_build_is_refused_before_the_builder_sees_it(pattern: str, tmp_path: Path) -> None:
    path = written(SAMPLES[pattern][0], tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=r"would fail on this graph, or build it wrong: at \w+ \("):
        build(path, target="tensorrt-rtx:sm86", progress=False)


@needs_builder
@pytest.mark.engine
@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("attention_in_float", "cannot build the network: .*no kernel for an Attention"),
        ("col2im", r"cannot read .*: node Col2Im: this version has the operator's name and does not"),
        ("dft", r"cannot read .*: node DFT: this version has no such operator"),
    ],
)
def test_tensorrt_rtx_does_what_the_table_says(pattern: str, complaint: str, tmp_path: Path) -> None:
    path = written(SAMPLES[pattern][0], tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=complaint):
        Network(RTX, path).build(Profile(1, 4, 8), (86,), progress=False)


@needs_builder
@pytest.mark.engine
def test_tensorrt_rtx_takes_uint8_for_int8(tmp_path: Path) -> None:
    bad, _ = SAMPLES["quantisation_to_uint8"]
    assert "INT8" in Network(RTX, written(bad, tmp_path / "m.onnx")).precisions
    with pytest.raises(BuildError, match="int8 has no zero point but 0"):
        Network(RTX, written((20, QUANTISED % ("uint8", 128)), tmp_path / "m.onnx"))


@needs_builder
@pytest.mark.engine
def test_tensorrt_rtx_normalises_one_group_without_its_channels(tmp_path: Path) -> None:
    """The mask of the axes that the parsed layer averages over; the channels are axis 1."""
    import tensorrt_rtx as trt

    network = Network(RTX, written(SAMPLES["group_norm_of_one_group"][0], tmp_path / "m.onnx"))
    layers = [network._network.get_layer(index) for index in range(network.layers)]
    (layer,) = (layer for layer in layers if layer.type == trt.LayerType.NORMALIZATION)
    layer.__class__ = trt.INormalizationLayer
    assert (layer.axes, layer.num_groups) == (0b1100, 1)


@needs_builder
@pytest.mark.engine
def test_tensorrt_rtx_dies_of_attention_of_one_tensor(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vmkd_fx.deploy.tensorrt import Network; "
        "from vmkd_fx.target import Profile; "
        "Network('tensorrt-rtx', Path(sys.argv[1])).build(Profile(1, 4, 8), (86,), progress=False)"
    )
    path = written(SAMPLES["attention_of_one_tensor"][0], tmp_path / "m.onnx")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True)
    assert done.returncode < 0  # of a signal
