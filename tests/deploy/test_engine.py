"""Engines are built for real, for GPUs that are not here."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from tests.deploy.conftest import needs_builder, small_mixer
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.engine import AHEAD_OF_TIME, build
from vmkd_fx.deploy.gpu import find_gpu
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.deploy.tensorrt import Network
from vmkd_fx.errors import BuildError, BundleError, MissingExtraError, OutputError
from vmkd_fx.steps import Step
from vmkd_fx.target import Profile, Target

pytestmark = [pytest.mark.engine, needs_builder]
without_gpu = pytest.mark.skipif(find_gpu().compute_capability is not None, reason="a GPU is here")


class InHalf(nn.Module):
    """A model in half precision between float32 images and float32 logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.half()).float()


@pytest.fixture(scope="module")
def in_half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "m.onnx"
    export(InHalf(small_mixer()), path, input_size=(3, 32, 32), tolerance=1e-2)
    return path


@without_gpu
@pytest.mark.parametrize("target", ["tensorrt-rtx:sm86", "tensorrt-rtx:sm89", "tensorrt-rtx:sm120"])
def test_an_engine_for_a_gpu_that_is_not_here(
    target: str, exported: tuple[Path, Step], tmp_path: Path
) -> None:
    out = tmp_path / "m.engine"
    step = build(exported[0], out, target=target, profile=Profile(1, 4, 16), progress=False)
    assert step.name == "engine" and step.checked == "built, not run"
    assert step.error is None and step.tolerance is None
    size = out.stat().st_size
    assert size > exported[0].stat().st_size
    assert step.detail.startswith(f"{target}; TensorRT-RTX 1.")
    for part in ("batch 1/4/16", "layers of FLOAT,", f"{size:,} bytes"):
        assert part in step.detail


@without_gpu
def test_a_bundle_takes_its_engine_in(bundle_path: Path) -> None:
    step = build(bundle_path, target="tensorrt-rtx", progress=False)
    bundle = read_bundle(bundle_path)
    ((name, info),) = bundle.engines.items()
    assert name == "model.tensorrt-rtx-sm86-sm89-sm120.engine"
    assert (info.target, info.profiles) == (Target("tensorrt-rtx", AHEAD_OF_TIME), (Profile(1, 8, 32),))
    assert bundle.manifest.ledger.steps[-1] == step
    build(bundle_path, target="tensorrt-rtx", progress=False)
    build(bundle_path, target="tensorrt-rtx", progress=False)
    assert read_bundle(bundle_path) == bundle


def test_the_engine_lies_beside_the_onnx_file_by_default(in_half: Path) -> None:
    build(in_half, target="tensorrt-rtx:sm86", progress=False)
    assert in_half.with_name("m.tensorrt-rtx-sm86.engine").is_file()


def test_turing_takes_half_and_nothing_else(
    exported: tuple[Path, Step], in_half: Path, tmp_path: Path
) -> None:
    step = build(in_half, tmp_path / "half.engine", target="tensorrt-rtx:sm75", progress=False)
    assert "layers of FLOAT, HALF" in step.detail
    with pytest.raises(
        BuildError, match=r"at node_\w+ \(MatMul, blocks.* sm75 takes matrix products in half"
    ):
        build(exported[0], tmp_path / "m.engine", target="tensorrt-rtx:sm75,sm86", progress=False)
    assert [item.name for item in tmp_path.iterdir()] == ["half.engine"]


def test_the_builder_itself_refuses_float32_for_turing(exported: tuple[Path, Step]) -> None:
    """Why the check before the build exists, and that a builder's complaint names the node."""
    network = Network("tensorrt-rtx", exported[0])
    with pytest.raises(
        BuildError, match=r"cannot build the network: node 'node_\w+' \(MatMul\) of blocks\.0\..* in float32"
    ):
        network.build(Profile(), (75,), progress=False)


def test_a_node_that_the_parser_refuses_is_named(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[b, 3, 8, 8] images) => (float[b, 8, 8, 2] logits)'
        "{ last = Transpose<perm=[0, 2, 3, 1]>(images)  logits = DFT(last) }"
    )
    model.graph.node[1].name = "the_transform"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=r"at the_transform \(DFT\): .*operator is not there"):
        build(tmp_path / "m.onnx", target="tensorrt-rtx:sm86", progress=False)


def test_a_fixed_batch_is_its_own_profile(mixer: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export(mixer, path, dynamic_batch=False)
    assert "batch 1/1/1" in build(path, target="tensorrt-rtx:sm86", progress=False).detail
    with pytest.raises(BuildError, match="fixed batch of 1, the profile asks for batch 1/8/32"):
        build(path, target="tensorrt-rtx:sm86", profile=Profile(), progress=False)


def test_what_cannot_be_built(exported: tuple[Path, Step], bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="'onnxruntime' needs no engine"):
        build(exported[0], target="onnxruntime")
    with pytest.raises(BuildError, match="there is no ONNX file and no bundle"):
        build(tmp_path / "nowhere.onnx", target="tensorrt-rtx")
    with pytest.raises(BuildError, match="is a bundle and keeps its own engines"):
        build(bundle_path, tmp_path / "m.engine", target="tensorrt-rtx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(BuildError, match=r"text\.onnx is no ONNX model"):
        build(tmp_path / "text.onnx", target="tensorrt-rtx", progress=False)
    (bundle_path / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="0 bytes"):
        build(bundle_path, target="tensorrt-rtx")


def test_an_engine_that_cannot_be_written_is_not_begun(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no graph")  # which is said where it is read
    with pytest.raises(OutputError, match="file is no folder"):
        build(tmp_path / "file", tmp_path / "file" / "m.engine", target="tensorrt-rtx:sm86", progress=False)


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_a_missing_tensorrt_names_its_extra(exported: tuple[Path, Step]) -> None:
    with pytest.raises(MissingExtraError, match=r"vmkd-fx\[tensorrt\]"):
        build(exported[0], target="tensorrt")


def test_a_missing_tensorrt_rtx_names_its_extra(exported: tuple[Path, Step]) -> None:
    code = (
        "import sys; sys.modules['tensorrt_rtx'] = None\n"
        "from vmkd_fx.deploy.engine import build\n"
        "from vmkd_fx.errors import MissingExtraError\n"
        "try: build(sys.argv[1], target='tensorrt-rtx')\n"
        "except MissingExtraError as error: print(error)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, exported[0]], capture_output=True, text=True, check=True
    )
    assert "vmkd-fx[rtx]" in found.stdout


def test_progress_is_plain_lines_where_there_is_no_terminal(
    exported: tuple[Path, Step], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build(exported[0], tmp_path / "m.engine", target="tensorrt-rtx:sm86")
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("building for TensorRT-RTX: 0/6, 0 s, started\n")


def test_progress_is_a_bar_on_a_terminal(exported: tuple[Path, Step], tmp_path: Path) -> None:
    code = (
        "import sys; from vmkd_fx.deploy.engine import build; "
        "build(sys.argv[1], sys.argv[2], target='tensorrt-rtx:sm86')"
    )
    command = [sys.executable, "-c", code, exported[0], tmp_path / "m.engine"]
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    process = subprocess.Popen(command, stderr=slave)
    os.close(slave)
    shown = ""
    with suppress(OSError):  # a terminal ends with an error
        while text := os.read(master, 1 << 16):
            shown += text.decode(errors="replace")
    os.close(master)
    assert process.wait() == 0
    assert "building for TensorRT-RTX:" in shown and "6/6" in shown
