"""Running an engine: device memory, one stream, one execution context. Needs a GPU."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.deploy.gpu import cuda
from vmkd_fx.deploy.tensorrt import package
from vmkd_fx.errors import BuildError
from vmkd_fx.extras import require
from vmkd_fx.target import Profile


class EngineBackend:
    """One engine on CUDA device 0; called with float32 (B, C, H, W), it returns float32 logits (B, classes).

    Attributes:
        name: the package and its version.
        smallest, largest: the batch sizes it takes.
    """

    def __init__(self, kind: str, engine: bytes, profile: Profile) -> None:
        """Load `engine` and set aside device memory for its largest batch.

        Raises:
            BuildError: the engine belongs to another version or another GPU.
            MissingExtraError: the package of `kind`, or cuda-bindings, is not installed.
        """
        runtime = package(kind)
        runtime.messages.errors.clear()
        self.name = runtime.version
        self.smallest, self.largest = profile.smallest, profile.largest
        self._cuda = require("cuda.bindings.runtime", "rtx", "running an engine")
        self._runtime = runtime.module.Runtime(runtime.messages)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        self._context: Any = self._engine.create_execution_context() if self._engine else None
        if self._context is None:
            reason = "; ".join(runtime.messages.errors) or "no reason given"
            raise BuildError(
                f"{self.name} cannot load the engine: {reason}; build it again with this version"
            )
        self._stream = cuda("cudaStreamCreate")
        self._memory: dict[str, int] = {}
        weakref.finalize(self, _release, self._stream, self._memory)
        self._allocate(runtime.module)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch between `smallest` and `largest`."""
        images = np.ascontiguousarray(images)
        if not self._context.set_input_shape(self._input, images.shape):
            raise BuildError(f"the engine does not take images of shape {images.shape}")
        logits = np.empty(tuple(self._context.get_tensor_shape(self._output)), np.float32)
        kind = self._cuda.cudaMemcpyKind
        self._copy(self._memory[self._input], images.ctypes.data, images, kind.cudaMemcpyHostToDevice)
        if not self._context.execute_async_v3(int(self._stream)):
            raise BuildError(f"{self.name} could not run the engine on images of shape {images.shape}")
        self._copy(logits.ctypes.data, self._memory[self._output], logits, kind.cudaMemcpyDeviceToHost)
        cuda("cudaStreamSynchronize", self._stream)
        return logits

    def _copy(self, to: int, source: int, array: NDArray[np.float32], kind: Any) -> None:
        cuda("cudaMemcpyAsync", to, source, array.nbytes, kind, self._stream)

    def _allocate(self, trt: Any) -> None:
        engine, context = self._engine, self._context
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        types = {trt.nptype(engine.get_tensor_dtype(name)) for name in names}
        if len(inputs) != 1 or len(outputs) != 1 or types != {np.float32}:
            raise BuildError(
                f"expected an engine with one float32 input and output, found {inputs}, {outputs}"
            )
        (self._input,), (self._output,) = inputs, outputs
        context.set_input_shape(self._input, (self.largest, *engine.get_tensor_shape(self._input)[1:]))
        for name in names:
            count = math.prod(context.get_tensor_shape(name))
            self._memory[name] = cuda("cudaMalloc", count * np.dtype(np.float32).itemsize)
            context.set_tensor_address(name, int(self._memory[name]))


def _release(stream: Any, memory: dict[str, int]) -> None:
    cuda("cudaStreamSynchronize", stream)
    for pointer in memory.values():
        cuda("cudaFree", pointer)
    cuda("cudaStreamDestroy", stream)
