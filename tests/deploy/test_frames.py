"""Bytes all the way: the ONNX graph, the bundle, the runtime and the engine take frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

import vmkd_fx as vx
from tests.deploy.conftest import needs_builder
from vmkd_fx.cli import main
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.engine import build_engine
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.deploy.runtime import load
from vmkd_fx.deploy.tensorrt import Network
from vmkd_fx.errors import DataError, ModelError
from vmkd_fx.frames import Frames
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import randomise_
from vmkd_fx.target import parse_target

OWN = Preprocess((3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", crop_pct=0.9)


class Net(nn.Module):
    """A padded stem, whose scale folds and whose shift stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.stem(x)).mean((2, 3)))


def model() -> TracedModule:
    torch.manual_seed(0)
    return vx.trace(randomise_(Net()).eval(), input_size=(3, 32, 32))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model three times: on normalised images and on bytes of either layout."""
    folder, student = tmp_path_factory.mktemp("bundles"), model()
    return {
        frames: vx.deploy(student, folder / (frames[-4:] or "plain"), preprocess=OWN, frames=frames or None)
        for frames in ("", "uint8:nhwc", "uint8:nchw")
    }


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max())


def test_the_onnx_graph_takes_bytes(tmp_path: Path) -> None:
    lowered, shape = vx.lower(model(), frames="uint8"), [32, 32, 3]
    step = export(lowered, tmp_path / "m.onnx")
    assert step.error < 1e-5 and "batches 1, 2, 3" in step.checked
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert (images.type, images.shape[1:]) == ("tensor(uint8)", shape)
    bytes_ = np.random.default_rng(3).integers(0, 256, (5, *shape), dtype=np.uint8)
    expected = lowered(torch.from_numpy(bytes_)).detach().numpy()
    assert close(session.run(["logits"], {"images": bytes_})[0], expected)


@pytest.mark.parametrize("frames", ["uint8:nhwc", "uint8:nchw"])
def test_a_picture_gets_the_same_classes(
    frames: str, bundles: dict[str, Path], photo: Image.Image, tmp_path: Path
) -> None:
    photo.save(tmp_path / "photo.png")
    plain, run = (load(bundles[key], device="cpu") for key in ("", frames))
    for images in ([photo], [tmp_path / "photo.png", photo.rotate(90)]):
        assert close(run(images), plain(images))
        (expected, *_), (found, *_) = plain.classify(images), run.classify(images)
        assert [label for label, _ in found] == [label for label, _ in expected]


def test_arrays_of_bytes(bundles: dict[str, Path]) -> None:
    last = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    expected = load(bundles[""], device="cpu")(last)
    first = np.ascontiguousarray(last.transpose(0, 3, 1, 2))
    on_last, on_first = (load(bundles[f"uint8:{layout}"], device="cpu") for layout in ("nhwc", "nchw"))
    for run, images in ((on_last, last), (on_first, first), (on_first, last)):
        assert close(run(images), expected)
    for run, images, match in (
        (on_last, first, r"found uint8 .* expected uint8 \(B, 32, 32, 3\), or a list"),
        (on_first, last[:, :31], r"expected uint8 \(B, 3, 32, 32\) or \(B, 32, 32, 3\)"),
        (on_last, last.astype(np.float32), r"found float32 images .*; expected uint8 \(B, 32, 32, 3\)"),
    ):
        with pytest.raises(DataError, match=match):
            run(images)


def test_the_manifest_says_what_the_graph_takes(bundles: dict[str, Path]) -> None:
    manifests = {frames: read_bundle(path).manifest for frames, path in bundles.items()}
    assert manifests[""].frames is None
    assert manifests["uint8:nchw"].frames == Frames("nchw", OWN.mean, OWN.std)
    assert {manifest.preprocess for manifest in manifests.values()} == {OWN}
    assert "frames" in [step.name for step in manifests["uint8:nhwc"].ledger.steps]


def test_a_fixed_batch_and_a_graph_that_was_lowered_before(tmp_path: Path, photo: Image.Image) -> None:
    lowered = vx.lower(model(), frames=Frames("nhwc", OWN.mean, OWN.std))
    run = load(vx.deploy(lowered, tmp_path / "b", preprocess=OWN, dynamic_batch=False), device="cpu")
    expected = lowered(torch.from_numpy(np.stack([OWN.pixels(photo)] * 3))).detach().numpy()
    assert close(run([photo] * 3), expected)
    with pytest.raises(ModelError, match=r"normalises its frames with mean \(0.5, 0.4, 0.3\)"):
        vx.deploy(lowered, tmp_path / "c", preprocess=Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3))
    assert not (tmp_path / "c").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["lower", "resnet18", "--frames", "uint8:nhw"])
    assert exit_.value.code == 2
    assert "there is no layout of frames 'nhw'" in capsys.readouterr().err
    line = ["lower", "tests.deploy.test_frames:Net", "--input-size", "3,32,32", "--frames", "uint8:nchw"]
    assert main([*line, "--onnx", str(tmp_path / "m.onnx")]) == 0
    told = capsys.readouterr().out
    assert "uint8:nchw with mean" in told
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(uint8)"


@pytest.mark.engine
@needs_builder
@pytest.mark.parametrize("frames", ["uint8:nhwc", "uint8:nchw"])
def test_an_engine_takes_bytes(frames: str, bundles: dict[str, Path]) -> None:
    network = Network("tensorrt-rtx", bundles[frames] / "model.onnx")
    assert network.takes_bytes and network.input_shape[0] == -1
    assert not Network("tensorrt-rtx", bundles[""] / "model.onnx").takes_bytes
    target = parse_target("tensorrt-rtx:sm86,sm89,sm120")
    engine, *_ = build_engine(bundles[frames] / "model.onnx", target, None, False)
    assert len(engine) > 1000
