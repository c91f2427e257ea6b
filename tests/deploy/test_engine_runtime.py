"""Runs an engine; needs a GPU that TensorRT-RTX supports."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.deploy.conftest import needs_builder
from vmkd_fx.deploy.engine import build
from vmkd_fx.deploy.engine_runtime import EngineBackend
from vmkd_fx.deploy.gpu import find_gpu
from vmkd_fx.deploy.runtime import load
from vmkd_fx.errors import BuildError
from vmkd_fx.target import COMPUTE_CAPABILITIES, Profile

GPU = find_gpu()
needs_gpu = pytest.mark.skipif(
    GPU.compute_capability not in COMPUTE_CAPABILITIES,
    reason=GPU.why or f"TensorRT-RTX does not support sm{GPU.compute_capability}",
)


@needs_builder
@needs_gpu
@pytest.mark.gpu
def test_an_engine_computes_what_onnx_runtime_computes(bundle_path: Path) -> None:
    step = build(bundle_path, target="tensorrt-rtx", profile=Profile(2, 4, 8), progress=False)
    assert step.error is not None and step.error < 1e-2
    assert step.checked.startswith(f"run on sm{GPU.compute_capability}")
    assert step.checked.endswith("against ONNX Runtime, batch 4")
    run, reference = load(bundle_path, device="gpu"), load(bundle_path, device="cpu")
    assert run.backend.startswith("TensorRT-RTX ")
    for batch in (1, 3, 8, 21):
        images = np.random.default_rng(batch).standard_normal((batch, 3, 32, 32), dtype=np.float32)
        expected = reference(images)
        for _ in range(4):  # from the third on as a CUDA graph
            np.testing.assert_allclose(run(images), expected, rtol=0, atol=1e-2 * np.abs(expected).max())
    assert {row.batch for row in run.latency().rows} == {2, 3, 5, 8}


@needs_builder
@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("lanes", [1, 3])
def test_threads_share_an_engine(lanes: int, bundle_path: Path) -> None:
    build(bundle_path, target="tensorrt-rtx", profile=Profile(1, 4, 8), progress=False)
    run = load(bundle_path, device="gpu", lanes=lanes)
    batches = [
        np.random.default_rng(seed).standard_normal((1 + seed, 3, 32, 32), dtype=np.float32)
        for seed in range(8)
    ]
    alone = [run(images) for images in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, batches * 10))
    for found, expected in zip(together, alone * 10, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@needs_builder
@pytest.mark.engine
def test_bytes_that_are_no_engine() -> None:
    with pytest.raises(BuildError, match=r"TensorRT-RTX .* cannot load the engine: "):
        EngineBackend("tensorrt-rtx", b"no engine", [Profile()])
