"""Networks are read back before they are built, and one that is not what was asked is refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import vmkd_fx as vx
from tests.deploy.conftest import needs_builder, small_mixer
from tests.deploy.precision.models import images, lowered
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.engine import build, build_engine
from vmkd_fx.deploy.gpu import find_gpu
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.deploy.precision.asked import Asked
from vmkd_fx.deploy.precision.readback import Layer, hold_to, inspected_types, read_layers
from vmkd_fx.deploy.precision.write import write_in
from vmkd_fx.deploy.tensorrt import Network, package
from vmkd_fx.errors import BuildError
from vmkd_fx.target import parse_target

TARGET = parse_target("tensorrt-rtx:sm86,sm89,sm120")


def layers(path: Path) -> list[Layer]:
    return read_layers(Network("tensorrt-rtx", path).definition)


@pytest.mark.engine
@needs_builder
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("residual", "int8"),
        *(
            pytest.param(name, precision, marks=pytest.mark.slow)
            for name in ("vit", "mixer", "residual")
            for precision in ("fp16", "bf16", "mixed", "int8")
            if (name, precision) != ("residual", "int8")
        ),
    ],
)
def test_every_precision_builds_and_reads_back(name: str, precision: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    _, asked = write_in(lowered(name), path, precision, images(), rest="fp16")
    _, _, step = build_engine(path, TARGET, None, False, asked=asked)
    products = {"vit": 20, "mixer": 10, "residual": 6}[name]
    spared = {"vit": 8, "mixer": 2, "residual": 2}[name] if precision == "int8" else 0
    assert f"{products - spared} products read back as {precision}, {spared} spared" in step.detail
    other = "bf16" if precision != "bf16" else "fp16"
    with pytest.raises(BuildError, match=rf"did not make {other} of the graph: \w+ \(\w+\) is "):
        build_engine(path, TARGET, None, False, asked=Asked(other))


@pytest.mark.slow
@pytest.mark.engine
@needs_builder
def test_norms_in_half_are_refused(tmp_path: Path) -> None:
    class InHalf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_mixer().half()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x.half()).float()

    export(InHalf(), tmp_path / "m.onnx", input_size=(3, 32, 32), tolerance=1e-2)
    with pytest.raises(BuildError, match=r"node_layer_norm \(NORMALIZATION\) is HALF, not FLOAT"):
        hold_to(layers(tmp_path / "m.onnx"), Asked("fp16"), "TensorRT-RTX")


@pytest.mark.engine
@needs_builder
def test_what_was_spared_must_be_spared(tmp_path: Path) -> None:
    _, asked = write_in(lowered("overflowing"), tmp_path / "m.onnx", "fp16", images())
    read = layers(tmp_path / "m.onnx")
    assert len(asked.kept) > 0
    assert f"{len(asked.kept)} spared" in hold_to(read, asked, "TensorRT-RTX")
    with pytest.raises(BuildError, match=f"{asked.kept[0]} .* is FLOAT, not HALF"):
        hold_to(read, Asked("fp16"), "TensorRT-RTX")
    half = next(layer.node for layer in read if layer.dtype == "HALF" and layer.kind == "MATRIX_MULTIPLY")
    with pytest.raises(BuildError, match=f"{half} .* is HALF, and was to be spared"):
        hold_to(read, Asked("fp16", (*asked.kept, half)), "TensorRT-RTX")


class Recurrent(nn.Module):
    """Tokens in a row, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 10)
        self.mlp, self.lstm = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lstm(self.stem(x).flatten(2).transpose(1, 2))[0]
        return self.head(torch.tanh(self.mlp(x)).mean(1))


@pytest.mark.engine
@needs_builder
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_the_parser_makes_of_a_recurrent_layer_is_spared(precision: str, tmp_path: Path) -> None:
    """It names only some of the layers of its loop."""
    graph = vx.lower(vx.trace(Recurrent().eval(), input_size=(3, 32, 32)), "tensorrt-rtx")
    _, asked = write_in(graph, tmp_path / "m.onnx", precision, images(), rest="fp16")
    assert any("lstm" in name for name in asked.kept)
    read = layers(tmp_path / "m.onnx")
    products = [layer for layer in read if "lstm" in layer.node and layer.kind == "MATRIX_MULTIPLY"]
    assert len(products) == 2 and {layer.dtype for layer in products} == {"FLOAT"}
    assert "read back as" in hold_to(read, asked, "TensorRT-RTX")


@pytest.mark.parametrize(
    ("operands", "says"),
    [(("INT8", ""), "FLOAT of INT8/not quantised operands, not INT8"), (("", ""), "is FLOAT, not INT8")],
)
def test_both_operands_of_an_int8_product_are_dequantised(operands: tuple[str, ...], says: str) -> None:
    right = Layer("a", "CONVOLUTION", "FLOAT", ("INT8", "INT8", ""))
    assert hold_to([right], Asked("int8"), "T") == "1 products read back as int8, 0 spared"
    with pytest.raises(BuildError, match=says):
        hold_to([right, Layer("b", "CONVOLUTION", "FLOAT", operands)], Asked("int8"), "T")


@pytest.mark.slow
@pytest.mark.engine
@needs_builder
def test_a_bundle_remembers_what_was_asked(tmp_path: Path) -> None:
    bundle = vx.deploy(
        lowered("residual"), tmp_path / "b", target="tensorrt-rtx:sm89", precision="int8", calibrate=images(),
        progress=False,
    )  # fmt: skip
    manifest = read_bundle(bundle).manifest
    assert manifest.precision == "int8" and len(manifest.kept) == 2
    steps = {step.name: step for step in manifest.ledger.steps}
    assert {"fp16", "onnx", "int8", "engine"} < steps.keys()
    assert "4 products read back as int8, 2 spared" in steps["engine"].detail
    assert "4 products read back as int8" in build(bundle, target="tensorrt-rtx:sm86", progress=False).detail


@pytest.mark.gpu
@pytest.mark.skipif(
    find_gpu().compute_capability is None or find_spec("tensorrt_rtx") is None, reason="no GPU, or no builder"
)
def test_the_inspector_of_an_engine_knows_half(tmp_path: Path) -> None:
    _, asked = write_in(lowered("vit"), tmp_path / "m.onnx", "fp16", images())
    target = parse_target(f"tensorrt-rtx:sm{find_gpu().compute_capability}")
    engine, _, step = build_engine(tmp_path / "m.onnx", target, None, False, asked=asked)
    assert step.error is not None and step.error < 1e-2
    found = package("tensorrt-rtx")
    loaded = found.module.Runtime(found.messages).deserialize_cuda_engine(engine)
    types = inspected_types(loaded, found.module)
    assert not types or any("half" in kind.lower() or "fp16" in kind.lower() for kind in types)
