"""Running an engine on CUDA device 0. Needs a GPU."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.deploy.batches import fitting
from vmkd_fx.deploy.builder.refit import refit
from vmkd_fx.deploy.builder.runtime_cache import RuntimeCache
from vmkd_fx.deploy.lane import Lane
from vmkd_fx.deploy.precision.readback import inspected_types
from vmkd_fx.deploy.tensorrt import package
from vmkd_fx.errors import BuildError
from vmkd_fx.extras import require
from vmkd_fx.target import Profile

_LOADING = threading.Lock()


class EngineBackend:
    """Called with images, it returns float32 logits (B, classes).

    Any number of threads may call it. `lanes` of them are on the GPU at the same time, each with a stream, an
    execution context and memory of its own; the others wait.

    Attributes:
        name: the package and its version.
        profiles: the batch sizes it takes, one a profile, in the engine's order.
    """

    includes = (
        "copy to the GPU, engine and copy back, through page-locked memory, as one CUDA graph where the "
        "batch size repeats; preparing images is not in it"
    )

    def __init__(
        self,
        kind: str,
        engine: bytes,
        profiles: Sequence[Profile],
        *,
        lanes: int = 1,
        graphs: bool = True,
        weights: bytes | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        """Load `engine` and set aside device memory for its largest batch.

        Args:
            kind: "tensorrt-rtx" or "tensorrt".
            engine: serialised, as `Network.build` returns it.
            profiles: of the engine, in its order.
            lanes: batches on the GPU at the same time. Each costs the engine's activation memory.
            graphs: use CUDA graphs.
            weights: the ONNX graph that a stripped engine takes its weights from.
            cache: a file where TensorRT-RTX keeps the kernels that it compiles on this device, written when
                the backend goes; TensorRT, which compiles nothing here, leaves it alone.

        Raises:
            BuildError: the engine belongs to another version or another GPU.
            MissingExtraError: the package of `kind`, or cuda-bindings, is not installed.
        """
        runtime = package(kind)
        require("cuda.bindings.runtime", "rtx", "running an engine")
        self.name = runtime.version
        self.profiles = tuple(profiles)
        self._trt, self._graphs = runtime.module, graphs
        self._runtime = runtime.module.Runtime(runtime.messages)
        with _LOADING:
            runtime.messages.errors.clear()
            # Engines that bring code of their own are refused: that is off in a runtime unless asked for.
            self._engine = self._runtime.deserialize_cuda_engine(engine)
            reason = "; ".join(runtime.messages.errors) or "no reason given"
        if self._engine is None:
            raise BuildError(
                f"{self.name} cannot load the engine: {reason}; build it again with this version"
            )
        if weights is not None:
            refit(runtime.module, runtime.messages, self._engine, weights)
        self._cache = RuntimeCache(cache) if cache is not None and kind == "tensorrt-rtx" else None
        if self._cache is not None:
            weakref.finalize(self, _keep, self._cache, self._engine)
        self._room = threading.Semaphore(lanes)
        self._free: queue.LifoQueue[Lane] = queue.LifoQueue()
        self._free.put(self._lane())  # what cannot be had is said at once

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits of a batch of the engine's own input, of a size that one of `profiles` takes.

        Raises:
            BuildError: none does, or the engine could not be run.
        """
        index = fitting(len(images), self.profiles)
        with self._room:
            try:
                lane = self._free.get_nowait()
            except queue.Empty:
                lane = self._lane()
            logits = lane.run(images, index)
            self._free.put(lane)  # a lane that failed is not used again
        return logits

    def layer_types(self) -> dict[str, int]:
        """How many outputs of the engine's layers have which type; a fused layer hides what is inside it."""
        return inspected_types(self._engine, self._trt)

    def _lane(self) -> Lane:
        return Lane(self._trt, self._engine, self.profiles, self._graphs, self._cache)


def _keep(cache: RuntimeCache, engine: Any) -> None:
    """`engine` is here to outlive the cache that came from it."""
    cache.keep()
