from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from tests.deploy.conftest import needs_builder
from vmkd_fx.deploy import gpu, runtime
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.bundle_write import add_engine, write_bundle
from vmkd_fx.deploy.gpu import Gpu, find_gpu
from vmkd_fx.deploy.latency import Recorder
from vmkd_fx.deploy.manifest import EngineInfo
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.deploy.runtime import load
from vmkd_fx.errors import BuildError, BundleError, DataError, UnknownNameError
from vmkd_fx.steps import Ledger, Step
from vmkd_fx.target import Profile, Target

INFO = EngineInfo(Target("tensorrt-rtx", (86,)), (Profile(),), "TensorRT-RTX 1.7.1.116")


def expected_logits(
    mixer: nn.Module, preprocess: Preprocess, pixels: NDArray[np.uint8]
) -> NDArray[np.float32]:
    with torch.no_grad():
        return mixer(torch.from_numpy(preprocess.normalise(pixels))).numpy()


def python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_arrays_paths_and_images_give_the_model_s_logits(
    bundle_path: Path, mixer: nn.Module, preprocess: Preprocess, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    run = load(bundle_path, device="cpu")
    images = [Image.fromarray(image) for image in pixels]
    paths = [tmp_path / f"{index}.png" for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    expected = expected_logits(mixer, preprocess, pixels)
    for given in (pixels, preprocess.normalise(pixels), images, paths, tuple(map(str, paths))):
        logits = run(given)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(run(paths[0]), run(images[:1]))


@pytest.mark.parametrize("batch", [1, 31, 33, 70])
def test_any_batch_size(bundle_path: Path, mixer: nn.Module, preprocess: Preprocess, batch: int) -> None:
    pixels = np.random.default_rng(batch).integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)
    expected = expected_logits(mixer, preprocess, pixels)
    found = load(bundle_path, device="cpu")(pixels)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_graph_with_a_fixed_batch_takes_any_batch_too(
    mixer: nn.Module, preprocess: Preprocess, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    export(mixer, tmp_path / "m.onnx", dynamic_batch=False)
    path = write_bundle(
        tmp_path / "bundle",
        onnx=tmp_path / "m.onnx",
        preprocess=preprocess,
        labels=(),
        ledger=Ledger(),
        name="mixer",
    )
    expected = expected_logits(mixer, preprocess, pixels)
    found = load(path)(pixels)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_batch_below_the_smallest_is_filled_up_and_cut_again(bundle_path: Path) -> None:
    """As for an engine whose profile starts above one."""
    batches = []

    def sums(images: NDArray[np.float32]) -> NDArray[np.float32]:
        batches.append(len(images))
        return images.sum(axis=(2, 3))

    sums.name, sums.includes, sums.profiles = "sums", "all", (Profile(2, 2, 3),)  # type: ignore[attr-defined]
    images = np.random.default_rng(0).standard_normal((7, 3, 32, 32), dtype=np.float32)
    run = runtime.Runner(read_bundle(bundle_path), sums, "")  # type: ignore[arg-type]
    np.testing.assert_array_equal(run(images), images.sum(axis=(2, 3)))
    assert batches == [3, 3, 2]


def test_classify(bundle_path: Path, pixels: NDArray[np.uint8]) -> None:
    run = load(bundle_path, device="cpu")
    images = [Image.fromarray(image) for image in pixels]
    logits = run(images).astype(np.float64)
    for row, pairs in zip(logits, run.classify(images, top=10), strict=True):
        labels, probabilities = zip(*pairs, strict=True)
        assert labels == tuple(f"digit {i}" for i in np.argsort(-row))
        np.testing.assert_allclose(probabilities, np.sort(np.exp(row) / np.exp(row).sum())[::-1], rtol=1e-9)
    assert [len(pairs) for pairs in run.classify(images[:2], top=3)] == [3, 3]


def test_labels_that_do_not_fit(bundle_path: Path, preprocess: Preprocess, tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32))
    for labels in (("a", "b"), ()):
        path = write_bundle(
            tmp_path / f"with {len(labels)}",
            onnx=bundle_path / "model.onnx",
            preprocess=preprocess,
            labels=labels,
            ledger=Ledger(),
            name="mixer",
        )
        if labels:
            with pytest.raises(BundleError, match="2 labels for 10 classes"):
                load(path).classify([image])
        else:
            assert {label for label, _ in load(path).classify([image], top=10)[0]} == set("0123456789")


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.zeros((2, 3, 32, 32)), r"found float64 images of shape \(2, 3, 32, 32\); expected float32"),
        (np.zeros((2, 3, 31, 32), np.float32), r"expected float32 \(B, 3, 32, 32\)"),
        (np.zeros((3, 32, 32), np.float32), r"expected float32 \(B, 3, 32, 32\)"),
        (np.zeros((2, 3, 32, 32), np.uint8), r"expected uint8 \(B, 32, 32, 3\)"),
        (np.zeros((0, 3, 32, 32), np.float32), "no images"),
        ([], "no images"),
        (["nowhere.png"], r"there is no image nowhere\.png"),
    ],
)
def test_what_are_no_images(bundle_path: Path, images: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load(bundle_path, device="cpu")(images)  # type: ignore[arg-type]


def test_threads_share_a_runner(bundle_path: Path) -> None:
    run = load(bundle_path, device="cpu", threads=1)
    batches = [
        np.random.default_rng(seed).standard_normal((1 + 5 * seed, 3, 32, 32), dtype=np.float32)
        for seed in range(8)
    ]
    alone = [run(images) for images in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, batches * 5))
    for found, expected in zip(together, alone * 5, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert sum(row.runs for row in run.latency().rows) == 6 * sum(-(-len(images) // 32) for images in batches)


def test_latency_on_request(bundle_path: Path) -> None:
    run = load(bundle_path, device="cpu")
    assert run.latency().rows == ()
    images = np.zeros((33, 3, 32, 32), np.float32)
    for _ in range(20):
        run(images)
    latency = run.latency()
    assert [(row.batch, row.runs) for row in latency.rows] == [(1, 20), (32, 20)]
    assert all(0 < row.p50 <= row.p90 <= row.p99 < 60 for row in latency.rows)
    assert "ONNX Runtime" in latency.what and "preparing images is not in it" in latency.what
    assert "p99 ms" in str(latency) and latency.what in str(latency)


def test_the_times_that_are_kept() -> None:
    recorder = Recorder()
    for milliseconds in (*[10**6] * 50, *range(1, 1001)):
        recorder.add(4, milliseconds / 1000)
    (row,) = recorder.latencies("").rows
    assert row.runs == 1000
    np.testing.assert_allclose((row.p50, row.p90, row.p99), (0.5005, 0.9001, 0.99001))


@pytest.mark.parametrize("option", [{"threads": 0}, {"lanes": 0}])
def test_options_that_are_no_options(option: dict[str, int], bundle_path: Path) -> None:
    with pytest.raises(DataError, match="a whole number from one up"):
        load(bundle_path, **option)  # type: ignore[arg-type]


def test_why_onnx_runtime(bundle_path: Path) -> None:
    assert load(bundle_path, device="cpu").why == "device='cpu' was asked for"
    run = load(bundle_path)
    assert run.backend.startswith("ONNX Runtime ") and run.why == "the bundle holds no engine"
    with pytest.raises(BuildError, match="cannot run on a GPU here: the bundle holds no engine"):
        load(bundle_path, device="gpu")
    with pytest.raises(UnknownNameError, match="no device 'cuda'"):
        load(bundle_path, device="cuda")


@pytest.mark.skipif(find_gpu().compute_capability is not None, reason="a GPU is here")
def test_why_onnx_runtime_without_a_gpu(bundle_path: Path) -> None:
    add_engine(read_bundle(bundle_path), b"an engine", INFO, Step("engine"))
    assert load(bundle_path).why.startswith("no GPU found")


@needs_builder
@pytest.mark.engine
@pytest.mark.parametrize(
    ("sm", "why"), [(90, r"built for this GPU \(sm90\)"), (86, "did not load: TensorRT-RTX")]
)
def test_why_onnx_runtime_when_no_engine_fits(
    bundle_path: Path, pixels: NDArray[np.uint8], sm: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX is asked for real and refuses these bytes."""
    add_engine(read_bundle(bundle_path), b"an engine", INFO, Step("engine"))
    monkeypatch.setattr(gpu, "find_gpu", lambda: Gpu(sm))
    run = load(bundle_path)
    assert run.backend.startswith("ONNX Runtime ") and run(pixels).shape == (7, 10)
    with pytest.raises(BuildError, match=why):
        load(bundle_path, device="gpu")


def test_a_graph_that_onnx_runtime_refuses(preprocess: Preprocess, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("no graph")
    path = write_bundle(
        tmp_path / "b",
        onnx=tmp_path / "m.onnx",
        preprocess=preprocess,
        labels=(),
        ledger=Ledger(),
        name="text",
    )
    with pytest.raises(BundleError, match=r"ONNX Runtime .* cannot load"):
        load(path)


def test_it_runs_without_torch_and_timm(bundle_path: Path, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    Image.fromarray(pixels[0]).save(tmp_path / "image.png")
    code = (
        "import sys; import vmkd_fx as vx\n"
        "for heavy in ('torch', 'timm', 'onnx', 'pydantic', 'yaml'): sys.modules[heavy] = None\n"
        "run = vx.load(sys.argv[1])\n"
        "print(run.classify([sys.argv[2]], top=1)[0][0][0])\n"
    )
    assert python(code, bundle_path, tmp_path / "image.png").startswith("digit ")


def test_imports_are_light() -> None:
    code = (
        "import sys; import vmkd_fx.deploy.runtime, vmkd_fx.deploy.engine, vmkd_fx.deploy.bundle\n"
        "heavy = ('torch', 'timm', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'cuda', 'tqdm')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert python(code).strip() == "[]"


def test_nothing_to_run_it_with_names_both_extras(bundle_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = sys.modules['tensorrt_rtx'] = None\n"
        "import vmkd_fx as vx; from vmkd_fx.errors import MissingExtraError\n"
        "try: vx.load(sys.argv[1])\n"
        "except MissingExtraError as error: print(error)"
    )
    message = python(code, bundle_path)
    assert "vmkd-fx[onnxruntime]" in message and "vmkd-fx[rtx]" in message and "holds no engine" in message


@pytest.mark.skipif(find_gpu().compute_capability is not None, reason="a GPU is here")
def test_a_machine_without_cuda_bindings_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert find_gpu().compute_capability is None and find_gpu().why.startswith("no GPU found: ")


def test_gpu_reads_the_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"Major": 8, "Minor": 9}
    success = SimpleNamespace(cudaSuccess=0)
    attributes = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="Major", cudaDevAttrComputeCapabilityMinor="Minor"
    )
    fake = SimpleNamespace(
        cudaError_t=success,
        cudaDeviceAttr=attributes,
        cudaGetDeviceCount=lambda: (0, 1),
        cudaDeviceGetAttribute=lambda attribute, device: (0, answers[attribute]),
    )
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    assert find_gpu() == Gpu(89)
