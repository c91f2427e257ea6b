"""CUDA and TensorRT as far as an engine's lanes use them, played on the processor where no GPU is.

Device memory is memory here, a stream runs what it is given at once unless it is recording, and an engine
sums its images. It follows the documented rules that a mistake would break: a context has to be given a shape
that its profile takes, and has to run once with that shape before it can be recorded.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from vmkd_fx.target import Profile

SHAPE, CLASSES = (3, 2, 2), 4


@dataclass
class Stream:
    recording: list[Callable[[], None]] | None = None
    spoiled: bool = False


class Cuda:
    """The module `cuda.bindings.runtime`; `taken` is what has not been given back."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="to", cudaMemcpyDeviceToHost="from")  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="local")  # noqa: N815

    def __init__(self) -> None:
        self.taken: dict[Any, Any] = {}
        self.launches = 0
        self.records_nothing = False

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, f"error {status}".encode()

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        held = ctypes.create_string_buffer(size)
        pointer = ctypes.addressof(held)
        self.taken[pointer] = held
        return 0, pointer

    cudaMallocHost = cudaMalloc  # noqa: N815

    def cudaFree(self, pointer: int) -> tuple[int]:  # noqa: N802
        del self.taken[pointer]
        return (0,)

    cudaFreeHost = cudaStreamDestroy = cudaGraphDestroy = cudaGraphExecDestroy = cudaFree  # noqa: N815

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        number = next(_NUMBERS)
        self.taken[number] = Stream()
        return 0, number

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        return (1 if self.taken[stream].recording is not None else 0,)

    def queue(self, stream: int, work: Callable[[], None]) -> None:
        recording = self.taken[stream].recording
        work() if recording is None else recording.append(work)

    def cudaMemcpyAsync(  # noqa: N802
        self, to: int, source: int, size: int, kind: str, stream: int
    ) -> tuple[int]:
        device = to if kind == "to" else source
        assert device in self.taken and size <= len(self.taken[device])
        self.queue(stream, lambda: ctypes.memmove(to, source, size))
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: str) -> tuple[int]:  # noqa: N802
        assert mode == "local" and self.taken[stream].recording is None
        self.taken[stream].recording = []
        self.taken[stream].spoiled = self.records_nothing
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int | None]:  # noqa: N802
        state = self.taken[stream]
        recorded, state.recording = state.recording, None
        if state.spoiled:
            return 901, None
        number = next(_NUMBERS)
        self.taken[number] = recorded
        return 0, number

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:  # noqa: N802
        assert flags == 0
        number = next(_NUMBERS)
        self.taken[number] = list(self.taken[graph])
        return 0, number

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:  # noqa: N802
        self.launches += 1
        for work in self.taken[graph]:
            self.queue(stream, work)
        return (0,)


_NUMBERS = itertools.count(1)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile, self.batch = engine, engine.profiles[0], 0
        self.settled = False
        self.addresses: dict[str, int] = {}
        self.busy = threading.Lock()

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile, self.batch = self.engine.profiles[index], 0
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.batch, self.settled = shape[0], False
        return self.profile.smallest <= shape[0] <= self.profile.largest and shape[1:] == SHAPE

    def execute_async_v3(self, stream: int) -> bool:
        cuda, batch = self.engine.cuda, self.batch
        if cuda.taken[stream].recording is not None and not self.settled:
            cuda.taken[stream].spoiled = True
        if not batch or self.engine.broken:
            return False
        self.settled = True
        cuda.queue(stream, lambda: self.compute(batch))
        return True

    def compute(self, batch: int) -> None:
        assert self.busy.acquire(blocking=False), "two threads in one context"
        images, logits = (ctypes.c_float.from_address(self.addresses[name]) for name in ("images", "logits"))
        size = batch * int(np.prod(SHAPE))
        given = np.ctypeslib.as_array(
            ctypes.cast(ctypes.byref(images), ctypes.POINTER(ctypes.c_float)), (size,)
        )
        sums = given.reshape(batch, -1).sum(axis=1, dtype=np.float64).astype(np.float32)
        time.sleep(self.engine.seconds)
        answer = np.repeat(sums[:, None], CLASSES, axis=1)
        ctypes.memmove(ctypes.byref(logits), answer.ctypes.data, answer.nbytes)
        self.busy.release()


@dataclass
class Engine:
    """Takes `images` and gives `logits`, or whatever a test lets it say."""

    cuda: Cuda
    profiles: tuple[Profile, ...]
    shapes: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {"images": (-1, *SHAPE), "logits": (-1, CLASSES)}
    )
    dtype: type = np.float32
    contexts: list[Context] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
    broken: bool = False
    seconds: float = 0.0

    @property
    def num_io_tensors(self) -> int:
        return len(self.shapes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "images" else "out"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_dtype(self, name: str) -> type:
        return self.dtype

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(cuda_graph_strategy="DISABLED")

    def create_execution_context(self, config: Any = None) -> Context:
        self.contexts.append(Context(self))
        self.configs.append(config)
        return self.contexts[-1]


def package(engine: Engine | None, *, rtx: bool) -> Any:
    """What `vmkd_fx.deploy.tensorrt.package` returns, for an engine that loads or does not."""
    module = SimpleNamespace(
        Runtime=lambda messages: SimpleNamespace(deserialize_cuda_engine=lambda data: engine),
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        nptype=lambda dtype: dtype,
    )
    if rtx:
        module.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE")
    return SimpleNamespace(module=module, messages=SimpleNamespace(errors=[]), version="Pretended 1.0")
