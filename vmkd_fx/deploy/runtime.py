"""Running a bundle: arrays in, arrays out, with neither torch nor timm.

An engine runs when the bundle has one for the GPU that is present and its package is installed; else ONNX
Runtime does, on the processor. `Runner.backend` says which, `Runner.why` why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmkd_fx.deploy.bundle import Bundle, read_bundle
from vmkd_fx.deploy.engine_runtime import EngineBackend
from vmkd_fx.deploy.gpu import find_gpu
from vmkd_fx.errors import BuildError, BundleError, DataError, MissingExtraError, UnknownNameError, VmkdError
from vmkd_fx.extras import require

Array: TypeAlias = NDArray[np.float32]
ImageSource: TypeAlias = "Image.Image | str | os.PathLike[str]"

DEVICES = ("auto", "cpu", "gpu")
_CPU_CHUNK = 32


class Backend(Protocol):
    """What runs the model: `name` for people, and the batch sizes it takes."""

    name: str
    smallest: int
    largest: int

    def __call__(self, images: Array) -> Array:
        """Logits (B, classes) of normalised images (B, C, H, W)."""


class OnnxBackend:
    """The ONNX graph in ONNX Runtime, on the processor."""

    def __init__(self, onnx: Path) -> None:
        """Load the graph.

        Raises:
            BundleError: ONNX Runtime refuses it.
            MissingExtraError: the extra `onnxruntime` is not installed.
        """
        runtime = require("onnxruntime", "onnxruntime", "running an ONNX graph")
        self.name = f"ONNX Runtime {runtime.__version__}"
        try:
            self._session = runtime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BundleError(f"{self.name} cannot load {onnx}: {error}") from error
        batch = self._session.get_inputs()[0].shape[0]
        self.smallest, self.largest = (batch, batch) if isinstance(batch, int) else (1, _CPU_CHUNK)

    def __call__(self, images: Array) -> Array:
        """Logits (B, classes) of normalised images (B, C, H, W)."""
        logits: Array = self._session.run(["logits"], {"images": images})[0]
        return logits


class Runner:
    """A bundle, loaded.

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

    def __call__(self, images: NDArray[np.float32] | NDArray[np.uint8] | Sequence[ImageSource]) -> Array:
        """Logits float32 (B, classes), for any B.

        Args:
            images: float32 (B, C, H, W), already normalised; or uint8 (B, H, W, C) of exactly the input size;
                or a list of paths and PIL images of any size.

        Raises:
            DataError: another type or shape, no images, or a path that holds none.
        """
        if isinstance(images, (str, os.PathLike, Image.Image)):
            images = [images]
        if len(images) == 0:
            raise DataError("there are no images to run")
        return np.concatenate([self._padded(batch) for batch in self._batches(images)])

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

    def _batches(self, images: NDArray[Any] | Sequence[ImageSource]) -> Iterator[Array]:
        """Normalised images, at most as many at a time as the backend takes."""
        preprocess = self.bundle.manifest.preprocess
        for start in range(0, len(images), self._run.largest):
            batch = images[start : start + self._run.largest]
            if not isinstance(batch, np.ndarray):
                yield np.stack([preprocess(image) for image in batch])
            elif batch.dtype == np.uint8:
                yield preprocess.normalise(batch)
            elif batch.dtype == np.float32 and batch.shape[1:] == preprocess.input_size:
                yield batch
            else:
                channels, height, width = preprocess.input_size
                raise DataError(
                    f"found {batch.dtype} images of shape {(len(images), *batch.shape[1:])}; expected "
                    f"float32 (B, {channels}, {height}, {width}), normalised, "
                    f"or uint8 (B, {height}, {width}, {channels}), or a list of paths or PIL images"
                )

    def _padded(self, batch: Array) -> Array:
        """Logits of a batch that may be smaller than the backend takes."""
        missing = max(0, self._run.smallest - len(batch))
        filled = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else batch
        return self._run(filled)[: len(batch)]


def load(path: str | os.PathLike[str], *, device: str = "auto") -> Runner:
    """Check the bundle at `path` and load it.

    Args:
        device: "auto", "cpu" (ONNX Runtime) or "gpu" (an engine or an error).

    Raises:
        BundleError: the bundle is damaged.
        MissingExtraError: nothing that could run it is installed.
        BuildError: `device="gpu"`, and there is no engine that this machine can run.
    """
    if device not in DEVICES:
        raise UnknownNameError("device", device, DEVICES)
    bundle = read_bundle(path)
    if device == "cpu":
        return Runner(bundle, OnnxBackend(bundle.onnx), "device='cpu' was asked for")
    engine, why = _engine(bundle)
    if engine is not None:
        return Runner(bundle, engine, why)
    if device == "gpu":
        raise BuildError(f"{bundle.path} cannot run on a GPU here: {why}")
    try:
        return Runner(bundle, OnnxBackend(bundle.onnx), why)
    except MissingExtraError as error:
        raise MissingExtraError(
            f"nothing here can run {bundle.path}: {why}, and ONNX Runtime is not installed. "
            "pip install 'vmkd-fx[onnxruntime]' for the processor, 'vmkd-fx[rtx]' for an RTX GPU"
        ) from error


def _engine(bundle: Bundle) -> tuple[EngineBackend | None, str]:
    """The first engine that loads here and why it was taken, or None and why there is none."""
    if not bundle.engines:
        return None, "the bundle holds no engine"
    gpu = find_gpu()
    if gpu.compute_capability is None:
        return None, gpu.why
    why = f"no engine in the bundle is built for this GPU (sm{gpu.compute_capability})"
    for path, info in bundle.engines.items():
        if gpu.compute_capability not in info.target.compute_capabilities:
            continue
        try:
            engine = EngineBackend(info.target.kind, path.read_bytes(), info.profile)
        except VmkdError as error:
            why = f"{path.name} did not load: {error}"
        else:
            return engine, f"{path.name} is built for this GPU (sm{gpu.compute_capability})"
    return None, why
