"""Writing an ONNX graph to a file, in one piece or in two, checking it there and running it.

One Protocol Buffers message ends at 2 GiB. The weights of a larger graph lie in a second file, by ONNX's own
means: a tensor names a file, an offset and a length. Every tensor begins at a page, so that a runtime can map
it instead of reading it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.deploy.manifest import LARGEST_ONNX
from vmkd_fx.errors import ExportError
from vmkd_fx.extras import require

if TYPE_CHECKING:
    from onnx import ModelProto

_PAGE = 4096
_SMALLEST = 1024  # what is smaller stays in the graph: shapes and scalars, which parsers want to see


def write_onnx(proto: ModelProto, path: Path, largest: int = LARGEST_ONNX) -> str:
    """Write `proto` to `path` and check it there; the size in words.

    Where it is larger than `largest` bytes, its weights move to a second file, `path` and ".data".

    Raises:
        ExportError: it is no valid ONNX graph.
    """
    onnx = require("onnx", "train", "writing ONNX")
    beside = ""
    if too_large(proto, largest):
        weights = path.with_name(f"{path.name}.data")
        with weights.open("wb") as file:
            beside = f" and {_split(proto, file, weights.name):,} in {weights.name}"
    data = proto.SerializeToString(deterministic=True)
    path.write_bytes(data)
    try:
        onnx.checker.check_model(path, full_check=True)  # full_check: strict shape inference as well
    except Exception as error:
        raise ExportError(f"the exporter wrote an invalid ONNX graph: {first_line(error)}") from error
    return f"{len(data):,} bytes{beside}"


def run_onnx(
    path: Path, images: Sequence[NDArray[Any]], instead: ModelProto | None = None
) -> list[NDArray[np.float32]]:
    """The logits of ONNX Runtime for each batch.

    Args:
        instead: run this graph, and not the one in the file.

    Raises:
        ExportError: ONNX Runtime refuses the graph.
    """
    runtime = require("onnxruntime", "train", "checking an exported model")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        if instead is not None:
            path = Path(folder) / path.name
            write_onnx(instead, path)
        try:
            session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"ONNX Runtime refuses the exported graph: {first_line(error)}") from error
        return [session.run(["logits"], {"images": batch})[0] for batch in images]


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def too_large(proto: ModelProto, largest: int) -> bool:
    """Whether the graph with its weights is larger than `largest` bytes, or nearly."""
    # The size of a message above the limit cannot be asked for, so the weights are counted first.
    weights = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    return weights > largest - largest // 64 or proto.ByteSize() > largest


def _split(proto: ModelProto, file: BinaryIO, name: str) -> int:
    """Move the weights of `proto` into `file`, which will lie beside the graph as `name`; its size."""
    external = 1  # TensorProto.EXTERNAL
    position = 0
    for tensor in proto.graph.initializer:
        data = tensor.raw_data
        if len(data) < _SMALLEST:
            continue
        position += file.write(bytes(-position % _PAGE))
        for key, value in (("location", name), ("offset", str(position)), ("length", str(len(data)))):
            tensor.external_data.add(key=key, value=value)
        position += file.write(data)
        tensor.ClearField("raw_data")
        tensor.data_location = external
    return position
