from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from tests.models import small
from vmkd_fx import __version__
from vmkd_fx.deploy import onnx_export
from vmkd_fx.deploy.onnx_export import export, relative_error
from vmkd_fx.errors import ExportError, OutputError
from vmkd_fx.passes.pipeline import lower
from vmkd_fx.steps import Step

SIZE = (3, 4, 4)


class FixedBatch(nn.Module):
    """Bakes the example's batch in, so that the exporter makes the input static without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.reshape(2 if len(images) == 2 else -1, 48))


class FixedLogits(FixedBatch):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1)).mean(0, keepdim=True).expand(2, -1)


class DictOutput(FixedBatch):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(images.flatten(1))}


class DataDependent(FixedBatch):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1) if images.sum() > 0 else -images.flatten(1))


class Plain(FixedBatch):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1))


class Magnifying(FixedBatch):
    """Three hundred times the difference of two sums makes rounding three hundred times as large."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.sin(3e2 * self.head(images.flatten(1)))


def test_onnx_runtime_agrees_on_a_batch_that_the_export_never_saw(
    mixer: nn.Module, exported: tuple[Path, Step]
) -> None:
    path, step = exported
    assert step.name == "onnx" and step.checked == "ONNX Runtime, batches 1, 2, 3"
    assert step.error is not None and step.error < step.tolerance == 1e-5
    proto = onnx.load(path)
    assert step.nodes == len(proto.graph.node)
    assert f"{path.stat().st_size:,} bytes" in step.detail and "opset 20" in step.detail
    images = np.random.default_rng(5).standard_normal((17, 3, 32, 32), dtype=np.float32)
    found = onnxruntime.InferenceSession(path).run(["logits"], {"images": images})[0]
    with torch.no_grad():
        expected = mixer(torch.from_numpy(images)).numpy()
    assert relative_error([found], [expected]) < 1e-5


def test_the_file_names_its_producer_and_no_path_of_this_machine(exported: tuple[Path, Step]) -> None:
    proto = onnx.load(exported[0])
    assert (proto.producer_name, proto.producer_version) == ("vmkd-fx", __version__)
    assert not proto.metadata_props
    assert b".py" not in exported[0].read_bytes()


def test_same_model_same_bytes(mixer: nn.Module, exported: tuple[Path, Step], tmp_path: Path) -> None:
    export(mixer, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == exported[0].read_bytes()


def test_modes_come_back_and_the_export_is_that_of_eval(tmp_path: Path) -> None:
    norm, dropout = nn.BatchNorm2d(4), nn.Dropout(0.5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), dropout, nn.Linear(16, 5))
    model.train()
    norm.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    export(model, tmp_path / "m.onnx", input_size=SIZE)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert "Dropout" not in {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}


def test_nothing_is_printed_or_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ExportError):
        export(DataDependent(), tmp_path / "m.onnx", input_size=SIZE)
    export(Plain(), tmp_path / "m.onnx", input_size=SIZE)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]
    assert logging.root.manager.disable == logging.NOTSET


def test_a_fixed_batch_when_asked_for(mixer: nn.Module, tmp_path: Path) -> None:
    step = export(mixer, tmp_path / "m.onnx", dynamic_batch=False)
    assert step.checked == "ONNX Runtime, batch 1"
    batch = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_value == 1 and not batch.dim_param


@pytest.mark.parametrize(("model", "value"), [(FixedBatch(), "images"), (FixedLogits(), "logits")])
def test_a_silently_static_batch_is_refused(model: nn.Module, value: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"batch of '{value}' came out fixed at 2"):
        export(model, tmp_path / "m.onnx", input_size=SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "size", "reason"),
    [
        (DictOutput(), SIZE, r"returns a dict with logits: .*vx\.strip.*vx\.lower"),
        (nn.Identity(), SIZE, r"returns \(1, 3, 4, 4\): expected logits"),
        (Plain(), (3, 5, 5), r"does not run on images \(1, 3, 5, 5\).*input_size="),
        (Plain(), None, r"Plain does not say its input size: pass input_size=\(C, H, W\)"),
        (DataDependent(), SIZE, "DataDependent cannot be written as ONNX: .*data-dependent"),
        (Plain().half(), SIZE, "does not run on images"),
    ],
)
def test_models_that_do_not_become_onnx(
    model: nn.Module, size: tuple[int, int, int] | None, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=reason):
        export(model, tmp_path / "m.onnx", input_size=size)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_the_exporter_does_not_write(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset 17: the exporter writes 18 to"):
        export(Plain(), tmp_path / "m.onnx", input_size=SIZE, opset=17)


def test_a_model_that_magnifies_rounding_is_held_to_what_rounding_does_to_it(tmp_path: Path) -> None:
    """Two right computations of it differ by more than 1e-5; the row says which bound holds, and why."""
    step = export(Magnifying(), tmp_path / "m.onnx", input_size=SIZE)
    assert step.error is not None and step.tolerance is not None
    assert 1e-5 < step.error <= step.tolerance <= 1e-3
    assert "the last bit of every weight makes" in step.checked


@pytest.mark.parametrize("model", [Plain, Magnifying])
def test_a_changed_weight_is_noticed(
    model: type[FixedBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check must fail when the exported graph is not the model: one bias is off by one percent."""
    written = onnx_export._to_onnx

    def corrupted(*arguments: object) -> onnx.ModelProto:
        proto = written(*arguments)  # type: ignore[arg-type]
        bias = next(tensor for tensor in proto.graph.initializer if list(tensor.dims) == [5])
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32(1.01), bias.name))
        return proto

    monkeypatch.setattr(onnx_export, "_to_onnx", corrupted)
    with pytest.raises(ExportError, match="ONNX Runtime differs from the model by"):
        export(model(), tmp_path / "m.onnx", input_size=SIZE)
    assert not list(tmp_path.iterdir())


def test_an_invalid_graph_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = onnx_export._to_onnx

    def corrupted(*arguments: object) -> onnx.ModelProto:
        proto = written(*arguments)  # type: ignore[arg-type]
        proto.graph.node.append(helper.make_node("Relu", ["nowhere"], ["unused"]))
        return proto

    monkeypatch.setattr(onnx_export, "_to_onnx", corrupted)
    with pytest.raises(ExportError, match="invalid ONNX graph"):
        export(Plain(), tmp_path / "m.onnx", input_size=SIZE)


def test_zero_logits_are_said_to_prove_little(tmp_path: Path) -> None:
    model = Plain()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    step = export(model, tmp_path / "m.onnx", input_size=SIZE)
    assert step.error == 0 and "every logit is 0" in step.checked


def test_not_a_number_is_no_agreement() -> None:
    nothing = np.full((1, 2), np.nan, np.float32)
    assert not relative_error([nothing], [np.ones((1, 2), np.float32)]) <= 1e-5


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        export(Plain(), tmp_path / "file" / "m.onnx", input_size=SIZE)


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "m.onnx"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        export(Plain(), path, input_size=SIZE)
    assert path.read_bytes() == b"earlier" and [item.name for item in tmp_path.iterdir()] == ["m.onnx"]


def test_equal_weights_are_stored_once(tmp_path: Path) -> None:
    """Layer norms without weights, which PoolFormer's become, need a scale of ones in ONNX."""
    export(lower(small("poolformer")), tmp_path / "m.onnx")
    weights = [tensor.raw_data for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer]
    large = [weight for weight in weights if len(weight) > 1024]
    assert large
    assert len(set(large)) == len(large)
