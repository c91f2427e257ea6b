"""Graphs that are too large for one file; here too large is what a test has at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from torch import nn

from tests.deploy.conftest import needs_builder
from tests.deploy.tiny import FORMS, PREPROCESS, tiny_graph
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.bundle_write import write_bundle
from vmkd_fx.deploy.engine import build
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.deploy.runtime import load
from vmkd_fx.errors import BundleError, OutputError
from vmkd_fx.steps import Ledger, Step

DATA = "model.onnx.data"


@pytest.fixture(scope="module")
def split(mixer: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Step]:
    path = tmp_path_factory.mktemp("split") / "model.onnx"
    return path, export(mixer, path, largest=10_000)


def bundled(onnx_file: Path, path: Path, preprocess: Preprocess) -> Path:
    return write_bundle(path, onnx=onnx_file, preprocess=preprocess, labels=(), ledger=Ledger(), name="mixer")


def test_the_weights_lie_beside_the_graph(split: tuple[Path, Step], exported: tuple[Path, Step]) -> None:
    path, step = split
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", DATA]
    assert step.error is not None and step.error <= 1e-5
    assert f"in {DATA}" in step.detail and "in m.onnx.data" not in exported[1].detail
    graph = onnx.load(path, load_external_data=False)
    large = [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert large and all(not t.raw_data for t in large)
    said = [{entry.key: entry.value for entry in tensor.external_data} for tensor in large]
    assert {entry["location"] for entry in said} == {DATA} and all(int(e["offset"]) % 4096 == 0 for e in said)
    whole = onnx.load(exported[0])
    for one, other in zip(onnx.load(path).graph.initializer, whole.graph.initializer, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(one), onnx.numpy_helper.to_array(other))


def test_the_same_model_gives_the_same_two_files(
    mixer: nn.Module, split: tuple[Path, Step], tmp_path: Path
) -> None:
    export(mixer, tmp_path / "model.onnx", largest=10_000)
    for file in ("model.onnx", DATA):
        assert (tmp_path / file).read_bytes() == (split[0].parent / file).read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_a_bundle_takes_them_along(
    form: str, split: tuple[Path, Step], exported: tuple[Path, Step], preprocess: Preprocess, tmp_path: Path
) -> None:
    path = bundled(split[0], tmp_path / form, preprocess)
    bundle = read_bundle(path)
    assert sorted(bundle.places) == ["model.onnx", DATA]
    assert bundle.manifest.files[DATA].kind == "weights"
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    reference = load(bundled(exported[0], tmp_path / "whole", preprocess), device="cpu")
    np.testing.assert_array_equal(load(path, device="cpu")(images), reference(images))
    with bundle.unpacked() as folder:
        assert (folder / DATA).read_bytes() == (split[0].parent / DATA).read_bytes()


def test_an_older_runtime_reads_them_from_a_folder(
    split: tuple[Path, Step], preprocess: Preprocess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime 1.23, the last for Python 3.10; the folder is gone when the first image comes."""
    path = bundled(split[0], tmp_path / "bundle.vmkd", preprocess)
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    expected = load(path, device="cpu")(images)
    monkeypatch.delattr(onnxruntime.SessionOptions, "add_external_initializers_from_files_in_memory", False)
    np.testing.assert_array_equal(load(path, device="cpu")(images), expected)


@pytest.mark.parametrize("form", FORMS)
def test_changed_weights_are_named(
    form: str, split: tuple[Path, Step], preprocess: Preprocess, tmp_path: Path
) -> None:
    path = bundled(split[0], tmp_path / form, preprocess)
    place = read_bundle(path).places[DATA]
    with place.path.open("r+b") as file:
        file.seek(place.offset + place.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(BundleError, match=rf"{DATA} was changed"):
        load(path)


@needs_builder
@pytest.mark.engine
@pytest.mark.parametrize("form", FORMS)
def test_an_engine_is_built_from_both_files(
    form: str, split: tuple[Path, Step], preprocess: Preprocess, tmp_path: Path
) -> None:
    path = bundled(split[0], tmp_path / form, preprocess)
    build(path, target="tensorrt-rtx:sm89", progress=False)
    bundle = read_bundle(path)
    (name,) = bundle.engines
    assert len(bundle.read(name)) > (split[0].parent / DATA).stat().st_size


def test_weights_that_are_not_there_or_not_beside(
    split: tuple[Path, Step], preprocess: Preprocess, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(split[0].read_bytes())
    with pytest.raises(BundleError, match=rf"there is no file .*{DATA}"):
        bundled(tmp_path / "model.onnx", tmp_path / "b", preprocess)
    graph = tiny_graph()
    tensor = graph.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../weights")
    (tmp_path / "m.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(BundleError, match=r"keeps weights in '\.\./weights', which is not beside it"):
        bundled(tmp_path / "m.onnx", tmp_path / "b", PREPROCESS)


def test_neither_file_appears_when_one_cannot_be_written(
    mixer: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / DATA).mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        export(mixer, tmp_path / "model.onnx", largest=10_000)
    assert [file.name for file in tmp_path.iterdir()] == [DATA]


def test_an_onnx_file_says_what_it_is(mixer: nn.Module, tmp_path: Path) -> None:
    import onnxruntime

    export(mixer, tmp_path / "m.onnx", metadata={"vmkd.b": "ö", "vmkd.a": "1"})
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"vmkd.a": "1", "vmkd.b": "ö"}
