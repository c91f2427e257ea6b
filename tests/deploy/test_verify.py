"""`verify`: what holds is signed, what does not is refused with the figures."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from torch import nn

from tests.deploy.conftest import needs_builder, small_mixer
from tests.deploy.test_engine_runtime import needs_gpu
from tests.deploy.tiny import INFO, STEP, edit_manifest
from vmkd_fx.cli import main
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.bundle_write import add_engine, record_verified
from vmkd_fx.deploy.engine import build
from vmkd_fx.deploy.manifest import ONNX, Comparison, Verified
from vmkd_fx.deploy.verify import RANDOM, examine, sign_off, verify
from vmkd_fx.deploy.verify_hops import in_torch
from vmkd_fx.deploy.verify_report import BOUNDS, fault_of
from vmkd_fx.errors import DataError, ModelError, VerificationError
from vmkd_fx.frames import Frames
from vmkd_fx.graph.trace import trace
from vmkd_fx.target import Profile

FACTORY = "tests.deploy.conftest:small_mixer"
ENGINE = f"model.{INFO.suffix}"


def spoil(bundle: Path, change: float = 1.01) -> None:
    """Scale one weight of the graph, and seal the manifest again as an attacker would."""
    path = bundle / ONNX
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight = numpy_helper.to_array(largest)
    largest.CopyFrom(numpy_helper.from_array((change * weight).astype(weight.dtype), largest.name))
    onnx.save(model, path)
    entry = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit_manifest(bundle, lambda data: data["files"][ONNX].update(entry))


def test_a_bundle_that_computes_what_its_model_computes_is_signed(
    bundle_path: Path, mixer: nn.Module
) -> None:
    found = verify(bundle_path, model=mixer)
    (hop,) = found.hops
    assert (str(hop), hop.result, hop.images) == ("torch -> model.onnx", "pass", RANDOM)
    assert hop.error is not None and hop.error < 1e-5
    assert (hop.agreement, hop.least) == (1.0, None)  # random images are held to the error alone
    assert set(hop.layers) == {"FLOAT"} and hop.layers["FLOAT"] > 10
    manifest = read_bundle(bundle_path).manifest
    assert manifest.covered and manifest.verified is not None
    (comparison,) = manifest.verified.comparisons
    assert (comparison.error, comparison.tolerance) == (hop.error, BOUNDS["fp32"].graph)
    assert comparison.detail.endswith("16 random images")
    signed = (bundle_path / "manifest.json").read_bytes()
    verify(bundle_path, model=mixer)
    assert (bundle_path / "manifest.json").read_bytes() == signed


@pytest.mark.parametrize("given", [False, True])
def test_changed_weights_are_found(
    given: bool, bundle_path: Path, mixer: nn.Module, pixels: NDArray[np.uint8]
) -> None:
    spoil(bundle_path)
    before = (bundle_path / "manifest.json").read_bytes()
    reason = r"torch -> model.onnx: the error is \d\.\de-0\d, and at most 1e-04 is allowed"
    with pytest.raises(VerificationError, match=reason):
        verify(bundle_path, model=mixer, images=pixels if given else None)
    assert (bundle_path / "manifest.json").read_bytes() == before
    found = examine(bundle_path, model=mixer)
    assert found.hops[0].result == "FAIL" and "FAIL" in str(found)


def test_a_sign_does_not_cover_what_changed_since(bundle_path: Path, mixer: nn.Module) -> None:
    verify(bundle_path, model=mixer)
    spoil(bundle_path)
    assert not read_bundle(bundle_path).manifest.covered


def test_pictures_are_held_to_agreement(bundle_path: Path, mixer: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (hop,) = verify(bundle_path, model=mixer, images=folder).hops
    assert (hop.images, hop.least, hop.result) == (3, 0.999, "pass")
    with pytest.raises(DataError, match="verification images: there is no folder"):
        verify(bundle_path, model=mixer, images=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("images", "error", "agreement", "least", "fault"),
    [
        (1000, 1e-6, 0.97, 0.97, ""),
        (1000, 1e-6, 0.969, 0.97, "31 of 1000 images have another first class, and 97.0 % of them"),
        (3, 1e-6, 2 / 3, 0.995, ""),  # one of three proves nothing
        (3, 1e-6, 1 / 3, 0.995, "2 of 3 images"),
        (16, 1e-6, 0.0, None, ""),
        (16, 2e-4, None, None, "the error is 2.0e-04, and at most 1e-04 is allowed"),
        (16, float("inf"), 1.0, 0.9, "the error is inf"),
        (16, float("nan"), None, None, "the error is nan"),
    ],
)
def test_bounds(images: int, error: float, agreement: float | None, least: float | None, fault: str) -> None:
    found = fault_of(images, error, 1e-4, agreement, least)
    assert found.startswith(fault) and bool(found) == bool(fault)


def test_eight_bits_want_pictures(bundle_path: Path, mixer: nn.Module, pixels: NDArray[np.uint8]) -> None:
    edit_manifest(bundle_path, lambda data: data.update(precision="int8"))
    (hop,) = examine(bundle_path, model=mixer).hops
    assert hop.result == "not run" and "calibrated on pictures" in hop.how
    assert examine(bundle_path, model=mixer, images=pixels).hops[0].bound == BOUNDS["int8"].graph


def test_another_model_is_refused(bundle_path: Path, mixer: nn.Module) -> None:
    other = small_mixer()
    other.reset_classifier(7)
    with pytest.raises(ModelError, match=r"gives 7 logits, the bundle .* 10: it was made of another model"):
        verify(bundle_path, model=other)
    with pytest.raises(VerificationError, match="the error is"):
        verify(bundle_path, model=nn.Sequential(mixer, nn.Softmax(-1)).eval())


def test_nothing_is_signed_when_nothing_could_be_compared(bundle_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"no hop of .* could be compared, so nothing was signed"):
        verify(bundle_path)
    assert read_bundle(bundle_path).manifest.verified is None


def test_a_sign_from_another_machine_stays_while_its_files_do(bundle_path: Path, mixer: nn.Module) -> None:
    bundle = add_engine(read_bundle(bundle_path), b"an engine", INFO, STEP)
    files = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    elsewhere = Comparison(ONNX, ENGINE, 16, 1e-3, 1e-2, 1.0, "on a board")
    record_verified(bundle, Verified(files, (elsewhere,), {"tensorrt": "11.4"}))

    found = replace(examine(bundle_path, model=mixer))
    verified = sign_off(replace(found, hops=found.hops[:1])).manifest.verified
    assert verified is not None
    assert [(c.before, c.after) for c in verified.comparisons] == [("torch", ONNX), (ONNX, ENGINE)]
    assert verified.comparisons[1] == elsewhere and verified.versions["tensorrt"] == "11.4"
    assert read_bundle(bundle_path).manifest.covered

    changed = add_engine(read_bundle(bundle_path), b"another engine", INFO, STEP)
    assert not changed.manifest.covered
    found = examine(bundle_path, model=mixer)
    verified = sign_off(replace(found, hops=found.hops[:1])).manifest.verified
    assert verified is not None and [c.after for c in verified.comparisons] == [ONNX]


def test_frames_reach_the_model_normalised(bundle_path: Path, mixer: nn.Module, pixels: NDArray) -> None:
    bundle = read_bundle(bundle_path)
    preprocess = bundle.manifest.preprocess
    frames = Frames("nhwc", preprocess.mean, preprocess.std)
    fed = replace(bundle, manifest=replace(bundle.manifest, frames=frames))
    module = trace(mixer).eval()
    expected = in_torch(module, preprocess.normalise(pixels), bundle)
    np.testing.assert_allclose(in_torch(module, pixels, fed), expected, rtol=1e-4, atol=1e-4)


@needs_builder
@pytest.mark.engine
def test_the_parser_is_asked_for_the_types(bundle_path: Path, mixer: nn.Module) -> None:
    add_engine(read_bundle(bundle_path), b"an engine", INFO, STEP)
    _, engine, parser = examine(bundle_path, model=mixer).hops
    assert engine.after == ENGINE
    assert parser.result == "pass" and parser.layers["FLOAT"] > 10 and "read back as fp32" in parser.how
    edit_manifest(bundle_path, lambda data: data.update(precision="fp16"))
    with pytest.raises(VerificationError, match=r"tensorrt-rtx parser: TensorRT-RTX .* did not make fp16"):
        verify(bundle_path, model=mixer)


@needs_builder
@needs_gpu
@pytest.mark.gpu
def test_an_engine_is_run_again_and_its_damage_found(bundle_path: Path, mixer: nn.Module) -> None:
    build(bundle_path, target="tensorrt-rtx", profile=Profile(1, 4, 8), progress=False)
    torch_hop, engine, parser = verify(bundle_path, model=mixer).hops
    assert (torch_hop.result, engine.result, parser.result) == ("pass", "pass", "pass")
    assert engine.error is not None and 0 < engine.error < BOUNDS["fp32"].engine
    assert read_bundle(bundle_path).manifest.covered
    spoil(bundle_path, 1.5)  # the engine is of the graph before
    with pytest.raises(VerificationError, match=r"model.onnx -> model.tensorrt-rtx-.*: the error is"):
        verify(bundle_path)


def test_the_command(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle_path), FACTORY, "--no-sign"]) == 0
    assert read_bundle(bundle_path).manifest.verified is None
    assert main(["verify", str(bundle_path), FACTORY]) == 0
    printed = capsys.readouterr().out
    assert "torch -> model.onnx" in printed and "pass" in printed
    assert printed.endswith("signed: model.onnx\n")
    spoil(bundle_path)
    assert main(["verify", str(bundle_path), FACTORY]) == 2
    said = capsys.readouterr()
    assert "FAIL" in said.out and "nothing was signed" in said.err
    assert main(["verify", str(bundle_path), "--model", "test_vit"]) == 2
    assert "belong to a MODEL_OR_CHECKPOINT" in capsys.readouterr().err


def test_without_torch_the_hop_is_named(bundle_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(torch=None, timm=None, onnx=None); from vmkd_fx.cli import main; "
        f"sys.exit(main(['verify', {str(bundle_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch -> model.onnx: not run: the model was not given" in done.stdout
    assert "no hop of" in done.stderr and "Traceback" not in done.stderr


def test_modes_and_gradients_stay(bundle_path: Path) -> None:
    model = small_mixer().train()
    examine(bundle_path, model=model)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
