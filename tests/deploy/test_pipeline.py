"""`vx.deploy`: a task goes in, a bundle that computes the same comes out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch

import vmkd_fx as vx
from tests.models import FoldableNet, images, small
from tests.slow import rest_slow
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.decode import decode
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.errors import ModelError, OutputError, UnknownNameError
from vmkd_fx.graph.verify import randomise_
from vmkd_fx.passes.lowering import PORTABLE
from vmkd_fx.passes.std_tokens import StdConfig, inject_std_tokens


@pytest.mark.parametrize("family", rest_slow(["mixer", "poolformer", "deit", "resmlp", "gmlp"], 2))
@pytest.mark.parametrize("predict", rest_slow(["mean", "class"]))
def test_the_bundle_computes_what_the_student_computes(family: str, predict: str, tmp_path: Path) -> None:
    student = randomise_(small(family))
    training = inject_std_tokens(vx.trace(student), StdConfig()).eval()
    bundle = vx.deploy(training, tmp_path / "bundle", predict=predict)
    run = vx.load(bundle, device="cpu")
    x = images(5, training.info.need_input_size()[1])
    expected = vx.strip(training, predict).eval()(x).detach().numpy()
    found = run(x.numpy())
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5


def test_the_ledger_reaches_the_bundle(tmp_path: Path) -> None:
    model = vx.trace(FoldableNet(), input_size=(3, 32, 32))
    manifest = read_bundle(vx.deploy(model, tmp_path / "b", labels=[f"c{i}" for i in range(10)])).manifest
    names = [step.name for step in manifest.ledger.steps]
    assert names == ["training graph", "evaluation", *(step.name for step in PORTABLE), "lowered", "onnx"]
    assert manifest.ledger.steps[-1].error < 1e-5
    assert manifest.labels[3] == "c3"
    said = {prop.key: prop.value for prop in onnx.load(tmp_path / "b" / "model.onnx").metadata_props}
    assert json.loads(said["vmkd.labels"]) == list(manifest.labels)
    assert decode(Preprocess, json.loads(said["vmkd.preprocess"]), "it") == manifest.preprocess
    assert json.loads(said["vmkd.versions"]) == manifest.created_with


def test_a_bundle_holds_no_operator_of_one_runtime(tmp_path: Path) -> None:
    """An engine can be built from it later, though it was lowered for ONNX Runtime."""
    model = small("deit")
    vx.export(vx.lower(model, "onnxruntime"), tmp_path / "m.onnx")
    vx.deploy(model, tmp_path / "b")
    domains = [
        {node.domain for node in onnx.load(path).graph.node}
        for path in (tmp_path / "m.onnx", tmp_path / "b" / "model.onnx")
    ]
    assert domains == [{"", "com.microsoft"}, {""}]


@pytest.mark.engine
def test_a_bundle_with_an_engine(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    path = vx.deploy(small("mixer"), tmp_path / "b", target="tensorrt-rtx:sm86,sm89,sm120", progress=False)
    bundle = read_bundle(path)
    (info,) = bundle.engines.values()
    assert str(info.target) == "tensorrt-rtx:sm86,sm89,sm120"
    assert bundle.manifest.ledger.steps[-1].checked == "built, not run"
    assert bundle.manifest.ledger.steps[-1].error is None


def test_timms_own_preprocessing(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=10)
    preprocess = read_bundle(vx.deploy(model, tmp_path / "b")).manifest.preprocess
    config = timm.data.resolve_data_config(model.pretrained_cfg)
    assert preprocess.input_size == config["input_size"]
    assert (preprocess.mean, preprocess.std) == (config["mean"], config["std"])
    for name in ("interpolation", "crop_pct", "crop_mode"):
        assert getattr(preprocess, name) == config[name]


def test_uint8_images_are_what_training_saw(tmp_path: Path) -> None:
    from vmkd_fx.distill.card import Card
    from vmkd_fx.distill.data import open_data

    data = open_data("digits", labelled=40, image_size=32)
    options = {"num_blocks": 2, "embed_dim": 24}
    card = Card("mixer_nano_32", options, (), data.input_size, data.mean, data.std, data.labels)
    model = randomise_(card.create()).eval()
    run = vx.load(vx.deploy(model, tmp_path / "b"), device="cpu")
    x = next(iter(data.validation_batches())).images
    pixels, _ = data.held_out()
    with torch.no_grad():
        np.testing.assert_allclose(run(pixels[: len(x)]), model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_it_refuses_before_it_works(tmp_path: Path) -> None:
    model = small("mixer")
    with pytest.raises(UnknownNameError, match="no target 'tensort'"):
        vx.deploy(model, tmp_path / "b", target="tensort")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(OutputError, match="full"):
        vx.deploy(model, tmp_path / "full")
    no_model = torch.nn.Identity()  # whose lowering is refused
    with pytest.raises(OutputError, match=r"notes\.txt is no folder"):
        vx.deploy(no_model, tmp_path / "full" / "notes.txt" / "b")
    with pytest.raises(ModelError, match="knows 10 classes, and 3 labels were given"):
        vx.deploy(model, tmp_path / "b", labels=["a", "b", "c"])
    assert not (tmp_path / "b").exists()
