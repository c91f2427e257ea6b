"""`bench`: what is measured, what is refused, and what stands beside the figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from tests.deploy.conftest import needs_builder
from tests.deploy.test_engine_runtime import needs_gpu
from vmkd_fx.cli import main
from vmkd_fx.deploy.bench import bench
from vmkd_fx.deploy.bench_machine import hints, usual_threads
from vmkd_fx.deploy.bench_memory import can_measure, peak_memory
from vmkd_fx.deploy.bench_plot import plot
from vmkd_fx.deploy.bench_race import LEAST_RUNS, Settings
from vmkd_fx.deploy.bench_report import Bench
from vmkd_fx.deploy.bench_sides import images_of, torch_side
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.engine import build
from vmkd_fx.errors import DataError, OutputError, UnknownNameError, VmkdError
from vmkd_fx.frames import Frames
from vmkd_fx.graph.trace import trace
from vmkd_fx.target import Profile

QUICK = Settings((3, 1, 1), LEAST_RUNS, warm_up=1, threads=1, memory=False)


@pytest.fixture(scope="module")
def found(_written: Path, mixer: nn.Module) -> Bench:
    """The mixer's bundle beside its model in torch."""
    return bench(_written, model=mixer, against=["torch", "onnxruntime"], settings=QUICK, show=False)


def test_every_side_has_figures_at_every_size(found: Bench) -> None:
    assert [(row.batch, row.side) for row in found.figures] == [
        (1, "bundle"),
        (1, "torch"),
        (3, "bundle"),
        (3, "torch"),
    ]
    for row in found.figures:
        assert row.runs == LEAST_RUNS and 0 < row.p50 <= row.p90 and row.first > 0
        assert row.p99 is None  # of twenty runs there is none
        assert 0 < row.images_per_second <= 2 * row.batch / row.p50  # half of the runs took p50 or more
        if row.side == "bundle":
            assert row.ratio is None and row.difference is None
        else:
            assert row.difference is not None and row.difference < 1e-4
            assert row.ratio is not None and row.ratio.low <= row.ratio.value <= row.ratio.high
    assert found.skipped == {"onnxruntime": "it is what runs the bundle here"}


def test_what_was_measured_stands_beside_each_figure(found: Bench, tmp_path: Path) -> None:
    found.write(tmp_path / "bench.json")
    data = json.loads((tmp_path / "bench.json").read_text())
    assert set(data) == {
        "format",
        "bundle",
        "machine",
        "versions",
        "settings",
        "memory",
        "results",
        "skipped",
        "hints",
    }
    assert data["settings"]["runs"] == LEAST_RUNS and data["settings"]["batches"] == [1, 3]
    assert set(data["bundle"]) == {"name", "precision", "onnx_sha256"}
    for result in data["results"]:
        assert set(result) == {
            "batch",
            "side",
            "runs",
            "first_ms",
            "p50_ms",
            "p90_ms",
            "p99_ms",
            "images_per_second",
            "peak_memory_bytes",
            "difference",
            "ratio",
            "setup",
        }
        setup = result["setup"]
        assert setup["threads"] == 1 and setup["transfers"] == "none" and setup["cuda_graphs"] == "none"
        assert "not in it" in setup["preparation"] and setup["device"] == data["machine"]["processor"]
    assert data["results"][0]["setup"]["runtime"].startswith("ONNX Runtime ")
    assert set(data["results"][1]["ratio"]) == {"value", "low", "high"}
    text = str(found)
    assert "bundle takes" in text and "not measured, onnxruntime: it is what" in text


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"runs": LEAST_RUNS - 1}, f"{LEAST_RUNS - 1} runs are too few"),
        ({"batches": (0,)}, "batch sizes"),
        ({"batches": ()}, "batch sizes"),
        ({"batches": tuple(range(1, 11))}, "batch sizes"),
        ({"threads": 0}, "threads=0"),
        ({"warm_up": 0}, "warm_up=0"),
        ({"seconds": math.nan}, "seconds=nan"),
    ],
)
def test_settings_that_say_nothing_are_refused(values: dict, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Settings(**values)


def test_sides_that_are_not_there(bundle_path: Path, mixer: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match="no side 'tensorflow'"):
        bench(bundle_path, against=["tensorflow"], settings=QUICK)
    with pytest.raises(DataError, match="against 'torch': that needs the model"):
        bench(bundle_path, against=["torch"], settings=QUICK)
    alone = bench(bundle_path, settings=QUICK, show=False)
    assert set(alone.sides) == {"bundle"}
    assert alone.skipped["torch"].startswith("the model was not given")
    larger = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    larger.info = replace(trace(mixer).info, name="larger")
    failed = bench(bundle_path, model=larger, against=["torch"], settings=QUICK, show=False)
    assert failed.skipped["torch"].startswith("batch 1: RuntimeError: ")
    assert {row.side for row in failed.figures} == {"bundle"}


def test_the_model_that_is_given_stays_as_it_is(bundle_path: Path, mixer: nn.Module) -> None:
    before = {key: value.data_ptr() for key, value in mixer.state_dict().items()}
    modes = [module.training for module in mixer.modules()]
    bench(bundle_path, model=mixer, against=["torch"], settings=QUICK, show=False)
    assert {key: value.data_ptr() for key, value in mixer.state_dict().items()} == before
    assert [module.training for module in mixer.modules()] == modes


def test_torch_takes_the_bytes_that_the_bundle_takes(
    bundle_path: Path, mixer: nn.Module, pixels: NDArray[np.uint8]
) -> None:
    manifest = read_bundle(bundle_path).manifest
    preprocess = manifest.preprocess
    module = trace(mixer).eval()
    plain = torch_side(module, manifest, compiled=False, on_gpu=False, threads=1)
    expected = plain(preprocess.normalise(pixels))
    for layout, images in (("nhwc", pixels), ("nchw", pixels.transpose(0, 3, 1, 2).copy())):
        given = replace(manifest, frames=Frames(layout, preprocess.mean, preprocess.std))
        side = torch_side(module, given, compiled=False, on_gpu=False, threads=1)
        np.testing.assert_allclose(side(images), expected, rtol=1e-4, atol=1e-4)
        assert images_of(given, 2).dtype == np.uint8 and images_of(given, 2).shape[1:] == images.shape[1:]


@pytest.mark.skipif(not can_measure(False), reason="this system does not say what a process took")
def test_memory_is_measured_in_a_process_of_its_own(bundle_path: Path) -> None:
    options = {"device": "cpu", "on_gpu": False, "threads": 1}
    found = peak_memory("bundle", str(bundle_path), None, (64, 1), **options)
    assert list(found) == [1, 64]
    assert 0 < found[1] <= found[64] < 2**30
    assert found[64] >= 64 * 3 * 32 * 32 * 4  # the images alone
    with pytest.raises(VmkdError, match=r"a process for bundle failed: .*is not a bundle"):
        peak_memory("bundle", str(bundle_path.parent), None, (1,), **options)


def test_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert not any("not locked" in hint for hint in hints(True, [1980, 1980]))
    assert any("from 345 to 1980 MHz" in hint for hint in hints(True, [345, 1980]))
    assert any("could not be read" in hint for hint in hints(True, []))
    assert any("OMP_WAIT_POLICY" in hint for hint in hints(False, [], torch_threads=2))
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    assert any("busy with other work" in hint for hint in hints(False, []))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert usual_threads() == 3


def test_the_picture(found: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    plot(found, tmp_path / "bench.svg")
    drawn = (tmp_path / "bench.svg").read_text()
    for text in ("torch, batch 3", "bundle, batch 1", "time of the bundle over this side"):
        assert text in drawn
    plot(found, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match=r"name a file that ends in \.png, \.svg, \.pdf"):
        plot(found, tmp_path / "bench.xls")


def test_the_command(bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    line = ["bench", str(bundle_path), "--batch", "2", "--runs", "100", "--threads", "1", "--no-memory"]
    assert main([*line, "--out", str(out)]) == 0
    assert "images/s" in capsys.readouterr().out
    (result,) = json.loads(out.read_text())["results"]
    assert result["batch"] == 2 and result["p99_ms"] >= result["p90_ms"]
    assert main([*line, "--against", "compile"]) == 2
    assert "that needs the model" in capsys.readouterr().err
    assert main([*line[:-3], "--runs", "3"]) == 2
    assert "too few" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled(bundle_path: Path, mixer: nn.Module) -> None:
    settings = replace(QUICK, batches=(1, 2), memory=can_measure(False))
    found = bench(bundle_path, model=mixer, settings=settings, show=False)
    assert list(found.sides) == ["bundle", "torch", "compile"]
    compiled = [row for row in found.figures if row.side == "compile"]
    assert all(row.difference is not None and row.difference < 1e-4 for row in compiled)
    assert compiled[0].first > 10 * compiled[0].p50  # it was compiled then
    if settings.memory:
        assert all(row.memory for row in found.figures)


@needs_builder
@needs_gpu
@pytest.mark.gpu
def test_an_engine_beside_everything_else(bundle_path: Path, mixer: nn.Module) -> None:
    build(bundle_path, target="tensorrt-rtx", profile=Profile(1, 4, 8), progress=False)
    settings = replace(QUICK, memory=True)
    found = bench(bundle_path, model=mixer, settings=settings, device="gpu", show=False)
    assert list(found.sides) == ["bundle", "torch", "compile", "onnxruntime"]
    assert found.sides["bundle"].runtime.startswith("TensorRT-RTX ")
    assert found.sides["compile"].cuda_graphs == "yes"
    assert found.sides["onnxruntime"].transfers == "none"
    for row in found.figures:
        assert row.memory is not None
        assert row.difference is None or row.difference < 1e-2
