"""What a builder has on a machine with a GPU only: stripped and refittable engines, the runtime cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.deploy.conftest import needs_builder
from vmkd_fx.deploy.builder.options import BuildOptions
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.engine import build
from vmkd_fx.deploy.gpu import find_gpu
from vmkd_fx.deploy.runtime import load
from vmkd_fx.target import COMPUTE_CAPABILITIES, Profile

GPU = find_gpu()
pytestmark = [
    pytest.mark.gpu,
    needs_builder,
    pytest.mark.skipif(
        GPU.compute_capability not in COMPUTE_CAPABILITIES,
        reason=GPU.why or f"TensorRT-RTX does not support sm{GPU.compute_capability}",
    ),
]


def close(bundle: Path, batch: int, **loading: object) -> None:
    images = np.random.default_rng(batch).standard_normal((batch, 3, 32, 32), dtype=np.float32)
    expected = load(bundle, device="cpu")(images)
    found = load(bundle, device="gpu", **loading)(images)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * np.abs(expected).max())


def test_a_stripped_engine_takes_its_weights_from_the_graph(bundle_path: Path) -> None:
    sizes = []
    for options in (BuildOptions(), BuildOptions(stripped=True)):
        step = build(bundle_path, target="tensorrt-rtx", options=options, progress=False)
        assert step.error is not None and step.error < 1e-2
        (entry,) = (f for f in read_bundle(bundle_path).manifest.files.values() if f.engine)
        sizes.append(entry.bytes)
    assert sizes[1] < sizes[0]
    close(bundle_path, 3)


def test_a_refittable_engine_computes_the_same(bundle_path: Path) -> None:
    step = build(bundle_path, target="tensorrt-rtx", options=BuildOptions(refittable=True), progress=False)
    assert step.error is not None and step.error < 1e-2


def test_each_profile_is_used(bundle_path: Path) -> None:
    build(bundle_path, target="tensorrt-rtx", profile=[Profile(1, 1, 1), Profile(8, 16, 32)], progress=False)
    for batch in (1, 2, 8, 40):
        close(bundle_path, batch)


def test_the_runtime_cache_is_written_and_used(bundle_path: Path, tmp_path: Path) -> None:
    build(bundle_path, target="tensorrt-rtx", progress=False)
    cache = tmp_path / "runtime.cache"
    close(bundle_path, 4, cache=cache)
    written = cache.read_bytes()
    assert written
    close(bundle_path, 4, cache=cache)
    cache.write_bytes(b"another machine's")
    close(bundle_path, 4, cache=cache)
    assert cache.read_bytes() != b"another machine's"
