"""The sides of the hops: what torch, ONNX Runtime and engines make of the same images, and of which types."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.deploy.bundle import Bundle
from vmkd_fx.deploy.engine_runtime import EngineBackend
from vmkd_fx.deploy.manifest import ONNX, EngineInfo
from vmkd_fx.deploy.onnx_nodes import Node, read_graph
from vmkd_fx.deploy.precision.agreement import BATCH, logits_of_file
from vmkd_fx.deploy.precision.asked import Asked
from vmkd_fx.deploy.precision.readback import hold_to, read_layers
from vmkd_fx.deploy.runtime import Runner, load
from vmkd_fx.deploy.tensorrt import Network, package
from vmkd_fx.errors import ModelError
from vmkd_fx.extras import require

if TYPE_CHECKING:
    from vmkd_fx.graph.traced import TracedModule

Array = NDArray[np.float32]

_NUMBERS = ("FLOAT", "HALF", "BF16", "INT8", "FP8")
_EIGHTS = {"17": "FP8"}  # FLOAT8E4M3FN


def in_torch(module: TracedModule, images: NDArray[Any], bundle: Bundle) -> Array:
    """Logits of a stripped model, in its own precision and on its device.

    Args:
        images: as the bundle's graph takes them; a model that was trained on normalised ones gets them
            normalised.

    Raises:
        ModelError: the model takes other images.
    """
    import torch

    from vmkd_fx.graph.verify import logits_of

    found = []
    for start in range(0, len(images), BATCH):
        batch = torch_images(module, images[start : start + BATCH], bundle)
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                found.append(logits_of(module, batch))
        except Exception as error:  # a model may fail in any way
            raise ModelError(
                f"{module.info.name} does not run on images {tuple(batch.shape)}, which the bundle "
                f"{bundle.path} takes: {error}"
            ) from error
    return torch.cat(found).float().cpu().numpy()


def torch_images(module: TracedModule, images: NDArray[Any], bundle: Bundle) -> Any:
    """The images of the bundle's graph as the model takes them, on its device.

    Raises:
        ModelError: the model takes frames, and not the bundle's.
    """
    import torch

    from vmkd_fx.graph.values import reference_tensor

    frames, own, like = bundle.manifest.frames, module.info.frames, reference_tensor(module)
    batch = torch.from_numpy(images).to(like.device)
    if own is not None and own != frames:
        raise ModelError(
            f"{module.info.name} takes frames {own}, and the bundle {bundle.path} {frames or 'no frames'}: "
            "give the model that it was made of"
        )
    if own is not None:
        return batch
    if frames is None:
        return batch.to(like.dtype)
    from vmkd_fx.passes.frames import normalised

    return normalised(batch, frames).to(like.dtype)


def in_onnxruntime(bundle: Bundle, images: NDArray[Any]) -> tuple[Array, str]:
    """Logits of the bundle's graph on the processor, and how they came about.

    ONNX Runtime has no bfloat16 there: such a graph is run with its rounded weights in float32.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
        MissingExtraError: it is not installed, or for bfloat16 the extra `train`.
    """
    precision = bundle.manifest.precision
    runtime = require("onnxruntime", "onnxruntime", "running an ONNX graph")
    name = f"ONNX Runtime {runtime.__version__}"
    if precision == "fp8":
        with bundle.unpacked() as folder:
            return logits_of_file(folder / ONNX, images, as_written=True), f"{name}, node by node"
    if precision == "bf16":
        return _widened(bundle, images), f"{name}, its bfloat16 widened to float32"
    return load(bundle.path, device="cpu")(images), name


def in_engine(bundle: Bundle, name: str, info: EngineInfo, images: NDArray[Any]) -> tuple[Array, str]:
    """Logits of an engine, and how they came about.

    Raises:
        BuildError: it does not load or run.
    """
    backend = EngineBackend(info.target.kind, bundle.read(name), info.profiles)
    return Runner(bundle, backend, "")(images), backend.name


def engine_reason(info: EngineInfo, here: int | None, why: str) -> str:
    """Why an engine cannot be run here, or "".

    Args:
        here: compute capability of this machine's GPU, or None.
        why: there is no GPU.

    Raises:
        MissingExtraError: its package is not installed.
    """
    if here is None:
        return why
    if here not in info.target.compute_capabilities:
        return f"it is built for {info.target}, and this GPU is sm{here}"
    version = package(info.target.kind).version
    if version != info.built_with:
        return f"it was built with {info.built_with}, and {version} is installed"
    return ""


def parsed_layers(bundle: Bundle, kind: str) -> tuple[dict[str, int], str]:
    """The types of the layers that an engine's package makes of the graph, and in words that they are what
    the bundle was asked to be in.

    Raises:
        BuildError: the package refuses the graph, or makes something else of it.
        MissingExtraError: it is not installed.
    """
    version = package(kind).version
    with bundle.unpacked() as folder:
        network = Network(kind, folder / ONNX)
    layers = read_layers(network.definition)
    manifest = bundle.manifest
    said = hold_to(layers, Asked(manifest.precision, manifest.kept), version)
    return _counted(layer.dtype for layer in layers), f"parsed by {version}, {said}"


def graph_layers(bundle: Bundle) -> dict[str, int]:
    """The types of what the nodes of the ONNX graph compute, as far as the file says them."""
    with bundle.unpacked() as folder:
        graph = read_graph(folder / ONNX)
    return _counted(_type_of(node, graph.types) for node in graph.nodes if node.outputs)


def _type_of(node: Node, types: Mapping[str, str]) -> str:
    """Of what a node computes; of a quantisation that is the type of its zero point."""
    value = node.outputs[0]
    if node.operator == "QuantizeLinear" and len(node.inputs) > 2:
        value = node.inputs[2]
    return _EIGHTS.get(types.get(value, ""), types.get(value, ""))


def _counted(types: Iterable[str]) -> dict[str, int]:
    """How often each type that holds numbers occurs; shapes and indices are left out."""
    counts = Counter(types)
    return {kind: counts[kind] for kind in _NUMBERS if counts[kind]}


def _widened(bundle: Bundle, images: NDArray[Any]) -> Array:
    require("torch", "train", "running a graph in bfloat16 in ONNX Runtime")
    onnx = require("onnx", "train", "running a graph in bfloat16 in ONNX Runtime")
    from vmkd_fx.deploy.onnx_file import write_onnx
    from vmkd_fx.deploy.precision.widen import widened_file

    with bundle.unpacked() as folder, tempfile.TemporaryDirectory() as other:
        path = Path(other) / ONNX
        write_onnx(widened_file(onnx.load(folder / ONNX)), path)
        return logits_of_file(path, images)
