"""One way through an engine: a stream, memory on both sides, an execution context for each profile.

Each batch goes images -> page-locked memory -> device -> engine -> device -> page-locked memory -> logits,
all of it queued on one stream. Where a batch size comes again and again, the queue becomes one CUDA graph.
TensorRT-RTX records that itself, because it compiles kernels for a shape while it already runs others; for
TensorRT the stream is recorded here. A recording holds for one context and one shape; another one drops it.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.deploy.builder.runtime_cache import RuntimeCache
from vmkd_fx.deploy.gpu import cuda
from vmkd_fx.errors import BuildError, VmkdError
from vmkd_fx.extras import require
from vmkd_fx.target import Profile

# What is used of the packages, by class; a test holds it against what is installed and against this file.
TENSORRT_API = {
    "": ("ICudaEngine", "IExecutionContext", "Runtime", "TensorIOMode", "nptype"),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "create_execution_context",
        "get_tensor_dtype",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_shape",
        "num_io_tensors",
    ),
    "IExecutionContext": (
        "execute_async_v3",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    ),
    "TensorIOMode": ("INPUT",),
}
TENSORRT_RTX_API = {
    "": ("CudaGraphStrategy", "IRuntimeConfig"),
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeConfig": ("cuda_graph_strategy",),
    "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE",),
}

_BEFORE_RECORDING = (
    2  # runs of one shape: the first settles what TensorRT puts off, the second shows it repeats
)


class Lane:
    """One batch at a time; for one thread at a time."""

    def __init__(
        self,
        trt: Any,
        engine: Any,
        profiles: Sequence[Profile],
        graphs: bool,
        cache: RuntimeCache | None = None,
    ) -> None:
        """Set aside memory for the largest batch.

        Args:
            trt: the module `tensorrt` or `tensorrt_rtx`.
            cache: where TensorRT-RTX keeps the kernels that it compiles.

        Raises:
            BuildError: the engine does not take images and give logits.
            VmkdError: the GPU's memory does not suffice.
        """
        self._trt, self._engine, self._profiles, self._cache = trt, engine, profiles, cache
        self._records_itself = graphs and hasattr(trt, "CudaGraphStrategy")
        self._recording = graphs and not self._records_itself
        self._contexts: dict[int, Any] = {}
        self._shape: tuple[int, int] | None = None  # profile and batch of the last run
        self._repeats = 0
        self._graph: Any = None
        self._kinds = require("cuda.bindings.runtime", "rtx", "running an engine").cudaMemcpyKind
        self._stream = cuda("cudaStreamCreate")
        self._taken: list[tuple[str, Any]] = [("cudaStreamDestroy", self._stream)]
        weakref.finalize(self, _release, self._taken)
        self._set_aside()

    def run(self, images: NDArray[Any], index: int) -> NDArray[np.float32]:
        """Logits of `images` with the profile at `index`.

        Raises:
            BuildError: the engine does not take them, or could not be run.
        """
        batch = len(images)
        if images.shape[1:] != self._images.shape[1:] or images.dtype != self._images.dtype:
            raise BuildError(
                f"the engine takes {self._images.dtype} (B, {str(self._images.shape[1:])[1:-1]}), "
                f"found {images.dtype} {images.shape}"
            )
        if (index, batch) != self._shape:
            self._take_shape(index, batch)
        np.copyto(self._images[:batch], images)
        if self._recording and self._graph is None and self._repeats == _BEFORE_RECORDING:
            self._record(index, batch)
        if self._graph is not None:
            cuda("cudaGraphLaunch", self._graph, self._stream)
        elif not self._queue(index, batch):
            raise BuildError(f"the engine could not be run on images of shape {images.shape}")
        cuda("cudaStreamSynchronize", self._stream)
        self._repeats += 1
        return self._logits[:batch].copy()

    def _queue(self, index: int, batch: int) -> bool:
        """Put a run on the stream: images to the device, engine, logits back."""
        images, logits = self._images[:batch], self._logits[:batch]
        here, there = self._kinds.cudaMemcpyHostToDevice, self._kinds.cudaMemcpyDeviceToHost
        source, target = self._pointers["images"], self._pointers["logits"]
        cuda("cudaMemcpyAsync", source, images.ctypes.data, images.nbytes, here, self._stream)
        if not self._contexts[index].execute_async_v3(int(self._stream)):
            return False
        cuda("cudaMemcpyAsync", logits.ctypes.data, target, logits.nbytes, there, self._stream)
        return True

    def _record(self, index: int, batch: int) -> None:
        """Make a CUDA graph of `_queue`. Where the engine cannot be recorded, it is queued as before."""
        mode = require("cuda.bindings.runtime", "rtx", "running an engine").cudaStreamCaptureMode
        # Other threads may go on setting memory aside meanwhile: that is what "thread local" allows.
        cuda("cudaStreamBeginCapture", self._stream, mode.cudaStreamCaptureModeThreadLocal)
        queued, recorded = False, None
        try:
            with suppress(VmkdError):
                queued = self._queue(index, batch)
        finally:
            with suppress(VmkdError):
                recorded = cuda("cudaStreamEndCapture", self._stream)
        if queued and recorded is not None:
            with suppress(VmkdError):
                self._graph = cuda("cudaGraphInstantiate", recorded, 0)
                self._taken.append(("cudaGraphExecDestroy", self._graph))
        if recorded is not None:
            with suppress(VmkdError):
                cuda("cudaGraphDestroy", recorded)
        self._recording = self._graph is not None

    def _take_shape(self, index: int, batch: int) -> None:
        """Make the context of the profile at `index` ready for `batch` images."""
        self._drop_graph()
        self._shape, self._repeats = None, 0
        if index not in self._contexts:
            self._contexts[index] = self._context(index)
        shape = (batch, *self._images.shape[1:])
        if not self._contexts[index].set_input_shape(self._names["images"], shape):
            raise BuildError(f"the engine does not take images of shape {shape}")
        self._shape = (index, batch)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._taken.remove(("cudaGraphExecDestroy", self._graph))
            cuda("cudaGraphExecDestroy", self._graph)
            self._graph = None

    def _context(self, index: int) -> Any:
        """An execution context with the profile at `index`."""
        engine, trt = self._engine, self._trt
        if self._records_itself or self._cache is not None:
            config = engine.create_runtime_config()
            if self._records_itself:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if self._cache is not None:
                self._cache.attach(config)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise BuildError("the engine gives no execution context: the GPU's memory may not suffice")
        if index and not context.set_optimization_profile_async(index, int(self._stream)):
            raise BuildError(f"the engine has no optimisation profile {index}: build it again")
        cuda("cudaStreamSynchronize", self._stream)
        for role, name in self._names.items():
            context.set_tensor_address(name, int(self._pointers[role]))
        return context

    def _set_aside(self) -> None:
        """Memory for images and logits of the largest batch, on the device and page-locked here."""
        engine, trt = self._engine, self._trt
        most = max(profile.largest for profile in self._profiles)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        shapes = {name: tuple(engine.get_tensor_shape(name))[1:] for name in names}
        types = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        if (
            [len(inputs), len(outputs)] != [1, 1]
            or types[inputs[0]] not in (np.float32, np.uint8)
            or types[outputs[0]] != np.float32
            or not all(size > 0 for shape in shapes.values() for size in shape)
        ):
            raise BuildError(
                "expected an engine from float32 or uint8 images to float32 logits, "
                f"found {inputs}, {outputs}"
            )
        self._names = {"images": inputs[0], "logits": outputs[0]}
        self._pointers: dict[str, Any] = {}
        arrays = {}
        for role, name in self._names.items():
            shape = (most, *shapes[name])
            size = math.prod(shape) * types[name].itemsize
            self._pointers[role] = self._take("cudaMalloc", "cudaFree", size)
            pinned = self._take("cudaMallocHost", "cudaFreeHost", size)
            held = (ctypes.c_char * size).from_address(int(pinned))
            arrays[role] = np.frombuffer(held, types[name]).reshape(shape)
        self._images, self._logits = arrays["images"], arrays["logits"]

    def _take(self, function: str, back: str, size: int) -> Any:
        pointer = cuda(function, size)
        self._taken.append((back, pointer))
        return pointer


def _release(taken: list[tuple[str, Any]]) -> None:
    """Give everything back, what was taken last first; the stream goes last."""
    with suppress(VmkdError):
        cuda("cudaStreamSynchronize", taken[0][1])
    for function, pointer in reversed(taken):
        with suppress(VmkdError):
            cuda(function, pointer)
