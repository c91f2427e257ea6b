"""An ONNX graph of any batch, for one batch: what the parser makes of it shows what a symbol costs."""

from __future__ import annotations

from pathlib import Path


def with_batch(source: Path, batch: int, path: Path) -> Path:
    """Write the graph of `source` for images `batch` at a time to `path`; no shape of a value inside stays.

    Returns:
        `path`.
    """
    import onnx

    proto = onnx.load(source)
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(proto, path)
    return path
