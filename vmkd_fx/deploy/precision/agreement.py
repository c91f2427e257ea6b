"""How far one set of logits is from another, and how often both decide alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.errors import ExportError

BATCH = 8


def compared(found: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float]:
    """The relative error and the top-1 agreement of logits (B, classes).

    The error is the largest absolute difference over the largest absolute expected value, infinite where
    `found` is not finite. The agreement is the share of images with the same highest logit; logits that are
    no numbers agree with nothing.
    """
    finite = np.isfinite(found).all(-1)
    same = (found.argmax(-1) == expected.argmax(-1)) & finite
    if not finite.all():
        return float("inf"), float(same.mean())
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    scale = float(np.abs(expected).max())
    return (difference / scale if scale else difference), float(same.mean())


def logits_of_file(path: Path, images: NDArray[Any], *, as_written: bool = False) -> NDArray[np.float32]:
    """What ONNX Runtime computes of an ONNX file on images (B, ...), on the processor.

    Args:
        as_written: node by node; its optimiser fuses products in fp8 into kernels that it does not have.

    Raises:
        ExportError: it refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime refuses {path}: {error}") from error
    fixed = session.get_inputs()[0].shape[0]
    size = fixed if isinstance(fixed, int) else BATCH
    batches = (images[i : i + size] for i in range(0, len(images), size))
    return np.concatenate([session.run(["logits"], {"images": batch})[0] for batch in batches])
