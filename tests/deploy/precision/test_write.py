"""ONNX files in half and in eight bits: the translation is right, and what is quantised is what should be."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import quantize_static
from torch import nn

import vmkd_fx as vx
from tests.deploy.precision.models import images, lowered
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.deploy.onnx_file import write_onnx
from vmkd_fx.deploy.precision import widen
from vmkd_fx.deploy.precision.agreement import compared, logits_of_file
from vmkd_fx.deploy.precision.asked import Asked
from vmkd_fx.deploy.precision.halves import in_half, logits
from vmkd_fx.deploy.precision.int8 import quantise
from vmkd_fx.deploy.precision.products import products_of, unquantised
from vmkd_fx.deploy.precision.write import check_precision, write_in
from vmkd_fx.errors import BuildError, DataError, ExportError, MissingExtraError, UnknownNameError
from vmkd_fx.graph.traced import TracedModule


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Graphs in float32."""
    folder = tmp_path_factory.mktemp("float32")
    paths = {name: folder / f"{name}.onnx" for name in ("mixer", "residual")}
    for name, path in paths.items():
        export(lowered(name), path)
    return paths


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_half_is_translated_as_exactly_as_float32(precision: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    ledger, asked = write_in(lowered("mixer"), path, precision, images())
    step = ledger.steps[-1]
    assert (step.name, step.tolerance) == ("onnx", 1e-5) and step.error <= 1e-5
    assert step.checked.startswith("ONNX Runtime, its half widened to float32, batches 1, 2, 3")
    assert asked == Asked(precision, ())
    graph = onnx.load(path).graph
    half = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
    types = Counter(tensor.data_type for tensor in graph.initializer)
    assert types[half] > types[TensorProto.FLOAT] > 0
    assert graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    if precision == "fp16":
        assert step.agreement >= 0.9
        error, _ = compared(logits_of_file(path, images()), logits(lowered("mixer"), images()))
        assert 0 < error < 2e-3


class Numbers(nn.Module):
    """Numbers that half does not hold, as operands of what is in half."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 10
        self.stem, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(torch.tanh(self.stem(x)) * 0.2294157 + 0.1).clamp(-0.0123, 0.2345)
        return self.head(torch.add(torch.tanh(x), torch.sigmoid(x), alpha=1.2345).flatten(1))


def test_numbers_beside_half_are_those_of_the_file(tmp_path: Path) -> None:
    """Torch would multiply a value in half by all digits of 0.2294157, and ONNX has only those of half."""
    lowered = vx.lower(vx.trace(Numbers(), input_size=(3, 32, 32)), "tensorrt-rtx", passes=[])
    ledger, _ = write_in(lowered, tmp_path / "m.onnx", "fp16", images())
    assert ledger.steps[-1].error < 1e-6


def test_a_wrong_translation_of_half_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thousandth, which running both in half could not tell from rounding."""
    right = widen.widened_module

    def wrong(module: TracedModule) -> TracedModule:
        wide = right(module)
        with torch.no_grad():
            wide.get_parameter("head.weight").mul_(1.001)
        return wide

    monkeypatch.setattr(widen, "widened_module", wrong)
    with pytest.raises(ExportError, match="ONNX Runtime differs from the model"):
        export(in_half(lowered("mixer"), "fp16", images()), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_eight_bits_are_what_tensorrt_takes(exported: dict[str, Path], tmp_path: Path) -> None:
    step, asked = quantise(exported["mixer"], tmp_path / "m.onnx", images())
    proto = onnx.load(tmp_path / "m.onnx")
    made = {output: node for node in proto.graph.node for output in node.output}
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    quantised = [node for node in proto.graph.node if node.name in {site.node for site in step.sites}]
    assert len(quantised) == step.matched == 8
    for node in quantised:
        operands = [made[name] for name in node.input[:2]]
        assert [operand.op_type for operand in operands] == ["DequantizeLinear"] * 2
        (weight,) = [operand for operand in operands if operand.input[0] in tensors]
        values, scales = tensors[weight.input[0]], tensors[weight.input[1]]
        axis = next(a.i for a in weight.attribute if a.name == "axis")
        # A channel of the result: a row of a weight on the left, a column of one on the right.
        assert axis == (0 if operands[0] is weight else 1)
        assert values.dtype == np.int8 and scales.shape == (values.shape[axis],)
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not tensors[node.input[2]].any(), "a zero point"
    assert not any(array.dtype == np.int32 for array in tensors.values()), "an int32 bias"
    read = {made[name].op_type for node in proto.graph.node for name in node.input if name in made
            if node.op_type in ("LayerNormalization", "Gelu")}  # fmt: skip
    assert "DequantizeLinear" not in read
    assert {r.reason for r in step.refused} == {"the first layer", "the last layer"}
    assert asked.kept == unquantised(proto) and len(asked.kept) == 2
    assert 0 < step.error < 0.2 and step.agreement >= 0.9
    assert proto.producer_name == "vmkd-fx" and not any("infer" in p.key for p in proto.metadata_props)


def test_residual_sums_of_convolutions_read_eight_bits(exported: dict[str, Path], tmp_path: Path) -> None:
    step, _ = quantise(exported["residual"], tmp_path / "m.onnx", images())
    graph = onnx.load(tmp_path / "m.onnx").graph
    made = {output: node.op_type for node in graph.node for output in node.output}
    arms = [sorted(made[name] for name in node.input) for node in graph.node if node.op_type == "Add"]
    assert arms == [["Conv", "DequantizeLinear"]] * 2
    assert "2 sums with an int8 arm" in step.detail


def test_what_is_not_quantised_reads_exact_values(tmp_path: Path) -> None:
    """A stream that a product and a norm read: eight bits are for the product alone."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[b, 4] images) => (float[b, 4] logits)'
        "<float[4, 4] w, float[4] g> { a = MatMul(images, w) s = Relu(a) m = MatMul(s, w)"
        " n = LayerNormalization(s, g) t = Add(s, m) u = Add(t, n) logits = MatMul(u, w) }"
    )
    for node in proto.graph.node:
        node.name = node.output[0]
    weights = {"w": np.eye(4, dtype=np.float32), "g": np.ones(4, np.float32)}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(proto, tmp_path / "a.onnx")
    step, asked = quantise(tmp_path / "a.onnx", tmp_path / "b.onnx", images(8, 2)[:, 0].reshape(8, 4))
    nodes = {node.name: list(node.input) for node in onnx.load(tmp_path / "b.onnx").graph.node}
    assert nodes["n"][0] == "s" and nodes["t"] == ["s", "m"]
    assert nodes["m"][0] != "s" and asked.kept == ("a", "logits") and step.matched == 1


def test_the_same_images_give_the_same_bytes(exported: dict[str, Path], tmp_path: Path) -> None:
    for name in "ab":
        quantise(exported["mixer"], tmp_path / name, images())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    quantise(exported["mixer"], tmp_path / "c", images(seed=1))
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_weights_lie_beside_a_large_graph_all_the_way(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph that comes, those that the quantiser writes on its way, and the one in eight bits."""
    asked = []

    def noted(*args: Any, **kwargs: Any) -> None:
        asked.append(kwargs["use_external_data_format"])
        quantize_static(*args, **kwargs)

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", noted)
    source = onnx.load(exported["residual"])
    write_onnx(source, tmp_path / "large.onnx", 10_000)
    step, _ = quantise(tmp_path / "large.onnx", tmp_path / "m.onnx", images(), largest=10_000)
    quantise(exported["residual"], tmp_path / "whole.onnx", images())
    assert asked == [True, False]
    data = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
    beside = {entry.value for tensor in data for entry in tensor.external_data if entry.key == "location"}
    assert beside == {"m.onnx.data"}
    large, whole = (onnx.load(tmp_path / name).graph for name in ("m.onnx", "whole.onnx"))
    assert large.node == whole.node
    for one, other in zip(large.initializer, whole.initializer, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
    assert step.agreement is not None and step.agreement > 0.9
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("large.onnx", "large.onnx.data", "m.onnx", "m.onnx.data", "whole.onnx"),
    ]


@pytest.mark.slow
def test_int8_over_half(tmp_path: Path) -> None:
    """What eight bits leave alone is in half, by the same rules as without them."""
    ledger, asked = write_in(lowered("residual"), tmp_path / "m.onnx", "int8", images(), rest="fp16")
    assert [step.name for step in ledger.steps[-3:]] == ["fp16", "onnx", "int8"]
    proto = onnx.load(tmp_path / "m.onnx")
    scales = {node.input[1] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    types = {t.data_type for t in proto.graph.initializer if t.name in scales}
    assert types == {TensorProto.FLOAT16}
    assert len(asked.kept) == 2
    expected = logits(lowered("residual"), images())
    error, agreement = compared(logits_of_file(tmp_path / "m.onnx", images()), expected)
    assert (error, agreement) == (ledger.steps[-1].error, ledger.steps[-1].agreement)


@pytest.mark.slow
def test_a_fixed_batch_is_calibrated_one_by_one(tmp_path: Path) -> None:
    _, asked = write_in(lowered("residual"), tmp_path / "m.onnx", "int8", images(3), dynamic_batch=False)
    assert len(asked.kept) == 2
    assert logits_of_file(tmp_path / "m.onnx", images(3)).shape == (3, 10)


def test_first_and_last_and_computed() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[b, 4] x) => (float[b, 4] y)'
        "<float[4, 4] w> { a = MatMul(x, w) b = MatMul(a, w) c = MatMul(b, a) d = MatMul(w, c)"
        " e = Relu(d) y = MatMul(e, w) }"
    )
    for node in proto.graph.node:
        node.name = node.output[0]
    proto.graph.initializer.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    found = {product.name: (product.kept, product.on_the_left) for product in products_of(proto)}
    assert found == {
        "a": ("the first layer", False),
        "b": ("", False),
        "c": ("a product of computed values", False),
        "d": ("", True),
        "y": ("the last layer", False),
    }


def test_what_cannot_work_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no precision 'fp15'; did you mean 'fp16'"):
        check_precision("fp15", "onnxruntime")
    for precision in ("int8", "fp8"):
        with pytest.raises(DataError, match=f"'{precision}': .* give calibrate=, --calibrate FOLDER"):
            check_precision(precision, "tensorrt-rtx")
    with pytest.raises(BuildError, match="ONNX Runtime does not run bf16"):
        check_precision("bf16", "onnxruntime")
    with pytest.raises(DataError, match="holds no pictures"):
        check_precision("fp16", "onnxruntime", tmp_path)
    check_precision("mixed", "onnxruntime")


@pytest.mark.skipif(find_spec("modelopt") is not None, reason="nvidia-modelopt is installed")
def test_fp8_names_what_it_needs() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'nvidia-modelopt\[onnx\]'"):
        check_precision("fp8", "tensorrt-rtx", images())


@pytest.mark.skipif(find_spec("modelopt") is None, reason="nvidia-modelopt is not installed")
def test_fp8_by_modelopt(tmp_path: Path) -> None:
    ledger, asked = write_in(lowered("vit"), tmp_path / "m.onnx", "fp8", images(), rest="fp16")
    step = ledger.steps[-1]
    assert step.name == "fp8" and step.matched == 12 and 0 < step.error < 0.2
    assert len(asked.kept) == 8  # first, last, and two products an attention
    kinds = {t.data_type for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert TensorProto.FLOAT8E4M3FN in kinds
