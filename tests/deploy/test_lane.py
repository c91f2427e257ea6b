"""What happens between arrays and an engine: profiles, recordings, threads, memory.

A pretended GPU plays the other side (`pretend_gpu.py`); `test_engine_runtime.py` has the tests on a real one.
"""

from __future__ import annotations

import ast
import gc
import inspect
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.deploy import pretend_gpu
from tests.deploy.conftest import needs_builder
from vmkd_fx.deploy import engine_runtime, lane
from vmkd_fx.deploy.engine_runtime import EngineBackend
from vmkd_fx.errors import BuildError
from vmkd_fx.target import Profile

PROFILES = (Profile(1, 1, 2), Profile(3, 8, 16))
Load = Callable[..., tuple[EngineBackend, pretend_gpu.Engine, pretend_gpu.Cuda]]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A backend, its engine and its CUDA."""

    def load(*, rtx: bool = False, lanes: int = 1, graphs: bool = True, **engine: Any) -> Any:
        cuda = pretend_gpu.Cuda()
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
        played = pretend_gpu.Engine(cuda, PROFILES, **engine)
        monkeypatch.setattr(engine_runtime, "package", lambda kind: pretend_gpu.package(played, rtx=rtx))
        return EngineBackend("tensorrt", b"", PROFILES, lanes=lanes, graphs=graphs), played, cuda

    return load


def images(batch: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((batch, *pretend_gpu.SHAPE), dtype=np.float32)


def sums(x: NDArray[np.float32]) -> NDArray[np.float32]:
    one = x.reshape(len(x), -1).sum(axis=1, dtype=np.float64).astype(np.float32)
    return np.repeat(one[:, None], pretend_gpu.CLASSES, axis=1)


@pytest.mark.parametrize("rtx", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_every_batch_that_a_profile_takes(rtx: bool, graphs: bool, loaded: Load) -> None:
    run, engine, _ = loaded(rtx=rtx, graphs=graphs)
    for seed, batch in enumerate([1, 2, 3, 16, 3, 1, 1, 1, 1, 7, 7, 7, 7, 2]):
        np.testing.assert_array_equal(run(images(batch, seed)), sums(images(batch, seed)))
    assert [context.profile for context in engine.contexts] == list(PROFILES)


def test_a_size_that_repeats_becomes_a_graph(loaded: Load) -> None:
    run, _, cuda = loaded()
    found = []
    for seed, batch in enumerate([1, 1, 1, 1, 2, 2, 1, 1, 1]):
        np.testing.assert_array_equal(run(images(batch, seed)), sums(images(batch, seed)))
        found.append(cuda.launches)
    assert found == [0, 0, 1, 2, 2, 2, 2, 2, 3]


def test_tensorrt_rtx_records_itself(loaded: Load) -> None:
    run, engine, cuda = loaded(rtx=True)
    for _ in range(5):
        run(images(1))
    assert cuda.launches == 0 and [config.cuda_graph_strategy for config in engine.configs] == ["WHOLE"]


def test_tensorrt_rtx_records_nothing_where_nothing_was_asked_for(loaded: Load) -> None:
    run, engine, _ = loaded(rtx=True, graphs=False)
    run(images(1))
    assert engine.configs == [None]


def test_an_engine_that_cannot_be_recorded_runs_as_before(loaded: Load) -> None:
    run, _, cuda = loaded()
    cuda.records_nothing = True
    for seed in range(5):
        np.testing.assert_array_equal(run(images(2, seed)), sums(images(2, seed)))
    assert cuda.launches == 0


def test_all_memory_is_given_back(loaded: Load) -> None:
    run, engine, cuda = loaded(lanes=2)
    for batch in (1, 1, 1, 1, 2, 4, 4, 4, 4):
        run(images(batch))
    assert len(cuda.taken) == 1 + 4 + 1  # a stream, images and logits on either side, a graph
    engine.contexts.clear()
    del run
    gc.collect()
    assert not cuda.taken


@pytest.mark.parametrize("lanes", [1, 3])
def test_threads_share_a_backend(lanes: int, loaded: Load) -> None:
    run, engine, _ = loaded(lanes=lanes, seconds=0.002)
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(6):
            x = images(1 + (number + turn) % 5, number)
            if not np.array_equal(run(x), sums(x)):
                wrong.append(f"thread {number}, turn {turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(engine.contexts) <= lanes * len(PROFILES)


def test_a_run_that_fails_is_an_error_and_its_lane_is_not_used_again(loaded: Load) -> None:
    run, engine, _ = loaded()
    run(images(1))
    engine.broken = True
    with pytest.raises(BuildError, match=r"could not be run on images of shape \(1, 3, 2, 2\)"):
        run(images(1))
    engine.broken = False
    np.testing.assert_array_equal(run(images(1)), sums(images(1)))
    assert len(engine.contexts) == 2


def test_images_of_another_kind_are_refused(loaded: Load) -> None:
    run, _, _ = loaded()
    for wrong in (images(1).astype(np.float16), images(1)[:, :, :1]):
        with pytest.raises(BuildError, match=r"the engine takes float32 \(B, 3, 2, 2\), found"):
            run(wrong)


@pytest.mark.parametrize(
    "engine",
    [
        {"shapes": {"images": (-1, 3, 2, 2), "logits": (-1, 4), "more": (-1, 4)}},
        {"shapes": {"images": (-1, 3, -1, 2), "logits": (-1, 4)}},
        {"dtype": np.float16},
    ],
)
def test_engines_of_another_kind_are_refused(engine: dict[str, Any], loaded: Load) -> None:
    with pytest.raises(BuildError, match="expected an engine from float32 or uint8 images to float32 logits"):
        loaded(**engine)


def test_a_context_that_there_is_no_memory_for(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    run, engine, _ = loaded()
    monkeypatch.setattr(engine, "create_execution_context", lambda *_: None, raising=False)
    with pytest.raises(BuildError, match="gives no execution context"):
        run(images(1))


def used(variables: dict[str, str]) -> set[tuple[str, str]]:
    """Class and attribute of everything that lane.py and engine_runtime.py read from these variables."""
    found = set()
    for module in (lane, engine_runtime):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value).removeprefix("self.")
                if owner in variables:
                    found.add((variables[owner], node.attr))
    return found


OWNERS = {
    "trt": "",
    "runtime.module": "",
    "_runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_contexts[index]": "IExecutionContext",
    "config": "IRuntimeConfig",
    "trt.TensorIOMode": "TensorIOMode",
    "trt.CudaGraphStrategy": "CudaGraphStrategy",
}


def listed(table: dict[str, tuple[str, ...]]) -> set[tuple[str, str]]:
    return {(owner, name) for owner, names in table.items() for name in names}


def test_the_lists_of_what_is_used_are_complete() -> None:
    classes = {("", name) for name in ("ICudaEngine", "IExecutionContext", "IRuntimeConfig")}
    both = listed(lane.TENSORRT_API) | listed(lane.TENSORRT_RTX_API)
    assert used(OWNERS) == both - classes


@needs_builder
@pytest.mark.engine
def test_tensorrt_rtx_has_all_that_is_used() -> None:
    trt = import_module("tensorrt_rtx")
    for owner, name in listed(lane.TENSORRT_API) | listed(lane.TENSORRT_RTX_API):
        assert hasattr(getattr(trt, owner) if owner else trt, name), f"{owner}.{name}"


def test_tensorrt_has_all_that_is_used() -> None:
    trt = pytest.importorskip("tensorrt", reason="TensorRT's bindings are not installed")
    for owner, name in listed(lane.TENSORRT_API):
        assert hasattr(getattr(trt, owner) if owner else trt, name), f"{owner}.{name}"
    assert not hasattr(trt, "CudaGraphStrategy"), "lane.py takes a package that has it for TensorRT-RTX"


def test_cuda_has_all_that_is_used() -> None:
    """Also that the pretended one has nothing that the real one lacks."""
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    names = {name for name in dir(pretend_gpu.Cuda) if name.startswith("cuda")}
    source = inspect.getsource(lane)
    called = {
        node.args[0].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "cuda"
        and isinstance(node.args[0], ast.Constant)
    }
    kept = {name for name in ("cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaGraphExecDestroy")}
    assert called | kept <= names and all(f'"{name}"' in source for name in kept)
    assert all(hasattr(real, name) for name in names)
    assert hasattr(real.cudaMemcpyKind, "cudaMemcpyHostToDevice")
    assert hasattr(real.cudaMemcpyKind, "cudaMemcpyDeviceToHost")
    assert hasattr(real.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
