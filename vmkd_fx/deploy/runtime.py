"""Running a bundle: arrays in, arrays out, with neither torch nor timm.

An engine runs when the bundle has one for the GPU that is present and its package is installed; else ONNX
Runtime does, on the processor. `Runner.backend` says which, `Runner.why` why.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmkd_fx.deploy.batches import cut
from vmkd_fx.deploy.bundle import Bundle, read_bundle_and_graph
from vmkd_fx.deploy.inputs import ImageSource, model_input
from vmkd_fx.deploy.latency import Latencies, Recorder
from vmkd_fx.deploy.manifest import ONNX
from vmkd_fx.deploy.onnx_backend import OnnxBackend, takes_weights_from_memory
from vmkd_fx.errors import BuildError, BundleError, DataError, MissingExtraError, UnknownNameError, VmkdError
from vmkd_fx.target import Profile

Array: TypeAlias = NDArray[np.float32]

DEVICES = ("auto", "cpu", "gpu")


class Backend(Protocol):
    """What runs the model.

    Attributes:
        name: for people.
        includes: what the time of a call includes, in words.
        profiles: the batch sizes it takes.
    """

    name: str
    includes: str
    profiles: tuple[Profile, ...]

    def __call__(self, images: NDArray[Any]) -> Array:
        """Logits (B, classes) of a batch of the model's own input. Any thread may call it."""


class Runner:
    """A bundle, loaded. Any number of threads may share it.

    Attributes:
        bundle: what was loaded.
        backend: the package that runs it, with its version.
        why: why that one.
    """

    def __init__(self, bundle: Bundle, run: Backend, why: str) -> None:
        self.bundle = bundle
        self.backend = run.name
        self.why = why
        self._run = run
        self._times = Recorder()

    def __call__(self, images: NDArray[np.float32] | NDArray[np.uint8] | Sequence[ImageSource]) -> Array:
        """Logits float32 (B, classes), for any B.

        Args:
            images: a list of paths and PIL images of any size; or uint8 (B, H, W, C) of exactly the input
                size; or what the graph itself takes, float32 (B, C, H, W), already normalised, or uint8 in
                the layout of its frames.

        Raises:
            DataError: another type or shape, no images, or a path that holds none.
        """
        if isinstance(images, (str, os.PathLike, Image.Image)):
            images = [images]
        if len(images) == 0:
            raise DataError("there are no images to run")
        return np.concatenate([self._timed(batch, size) for batch, size in self._batches(images)])

    def latency(self) -> Latencies:
        """How long the last batches of each size took; `what` says what that includes.

        Without a run there are no rows.
        """
        return self._times.latencies(f"{self.backend}: {self._run.includes}")

    def classify(self, images: Sequence[ImageSource], top: int = 5) -> list[list[tuple[str, float]]]:
        """For each image the `top` most probable labels with their probabilities, the most probable first.

        Raises:
            BundleError: the bundle has labels, but not as many as the model has classes.
            DataError: as in a call.
        """
        logits = self(images).astype(np.float64)
        classes = logits.shape[1]
        labels = self.bundle.manifest.labels or tuple(map(str, range(classes)))
        if len(labels) != classes:
            raise BundleError(f"{self.bundle.path} has {len(labels)} labels for {classes} classes")
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = odds / odds.sum(axis=1, keepdims=True)
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        return [
            [(labels[i], float(row[i])) for i in best] for row, best in zip(probabilities, order, strict=True)
        ]

    def _batches(self, images: NDArray[Any] | Sequence[ImageSource]) -> Iterator[tuple[NDArray[Any], int]]:
        """The model's input, cut for the backend, and with how many images each batch is to be run."""
        manifest = self.bundle.manifest
        for start, count, size in cut(len(images), self._run.profiles):
            yield model_input(images[start : start + count], manifest.preprocess, manifest.frames), size

    def _timed(self, batch: NDArray[Any], size: int) -> Array:
        """Logits of a batch, run with `size` images."""
        missing = size - len(batch)
        filled = np.pad(batch, ((0, missing), *[(0, 0)] * (batch.ndim - 1))) if missing else batch
        start = time.perf_counter()
        logits = self._run(filled)
        self._times.add(size, time.perf_counter() - start)
        return logits[: len(batch)]


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    threads: int | None = None,
    lanes: int = 1,
    spin: bool = True,
    cache: str | os.PathLike[str] | None = None,
) -> Runner:
    """Check the bundle at `path`, a folder or a file, and load it.

    Args:
        device: "auto", "cpu" (ONNX Runtime) or "gpu" (an engine or an error).
        threads: that ONNX Runtime computes a batch with; default: one a core.
        lanes: batches that an engine runs at the same time, each with memory of its own.
        spin: threads of ONNX Runtime without work wait busily: faster, and the core is taken from all else.
        cache: a file where TensorRT-RTX keeps the kernels that it compiles on this device.

    Raises:
        BundleError: the bundle is damaged.
        DataError: `threads` or `lanes` is below one.
        MissingExtraError: nothing that could run it is installed.
        BuildError: `device="gpu"`, and there is no engine that this machine can run.
    """
    if device not in DEVICES:
        raise UnknownNameError("device", device, DEVICES)
    if lanes < 1 or (threads is not None and threads < 1):
        raise DataError(f"threads={threads}, lanes={lanes}: each is a whole number from one up")
    bundle, graph = read_bundle_and_graph(path)
    if device == "cpu":
        return Runner(bundle, _onnx(bundle, graph, threads, spin), "device='cpu' was asked for")
    engine, why = _engine(bundle, graph, lanes, cache)
    if engine is not None:
        return Runner(bundle, engine, why)
    if device == "gpu":
        raise BuildError(f"{bundle.path} cannot run on a GPU here: {why}")
    try:
        return Runner(bundle, _onnx(bundle, graph, threads, spin), why)
    except MissingExtraError as error:
        raise MissingExtraError(
            f"nothing here can run {bundle.path}: {why}, and ONNX Runtime is not installed. "
            "pip install 'vmkd-fx[onnxruntime]' for the processor, 'vmkd-fx[rtx]' for an RTX GPU"
        ) from error


def _onnx(bundle: Bundle, graph: bytes, threads: int | None, spin: bool) -> OnnxBackend:
    """ONNX Runtime with the graph that was checked; large weights it reads from a folder, or from memory."""
    try:
        if not bundle.manifest.weights:
            return OnnxBackend(graph, threads=threads, spin=spin)
        if bundle.packed and takes_weights_from_memory():
            weights = {name: bundle.read(name) for name in bundle.manifest.weights}
            return OnnxBackend(graph, threads=threads, weights=weights, spin=spin)
        with bundle.unpacked() as folder:
            return OnnxBackend(folder / ONNX, threads=threads, spin=spin)
    except BundleError as error:
        raise BundleError(f"{bundle.path}: {error}") from error


def _engine(
    bundle: Bundle, graph: bytes, lanes: int, cache: str | os.PathLike[str] | None
) -> tuple[Backend | None, str]:
    """The first engine that loads here and why it was taken, or None and why there is none."""
    if not bundle.engines:
        return None, "the bundle holds no engine"
    # Here, because a box that runs ONNX Runtime starts sooner without them.
    from vmkd_fx.deploy.engine_runtime import EngineBackend
    from vmkd_fx.deploy.gpu import find_gpu

    gpu = find_gpu()
    if gpu.compute_capability is None:
        return None, gpu.why
    why = f"no engine in the bundle is built for this GPU (sm{gpu.compute_capability})"
    for name, info in bundle.engines.items():
        if gpu.compute_capability not in info.target.compute_capabilities:
            continue
        try:
            weights = graph if info.options.get("weights") == "stripped" else None
            engine = EngineBackend(
                info.target.kind,
                bundle.read(name),
                info.profiles,
                lanes=lanes,
                weights=weights,
                cache=cache,
            )
        except VmkdError as error:
            why = f"{name} did not load: {error}"
        else:
            return engine, f"{name} is built for this GPU (sm{gpu.compute_capability})"
    return None, why
