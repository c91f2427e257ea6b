"""Sessions of ONNX Runtime as the measurements use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions


def quiet_options(level: GraphOptimizationLevel) -> SessionOptions:
    """Options of a session that prints nothing."""
    options = SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    return options


def on_cpu(model: Path | bytes, options: SessionOptions) -> InferenceSession:
    """A session on the CPU, of a file or of what would stand in it."""
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def random_images(session: InferenceSession, batch: int) -> dict[str, np.ndarray]:
    """The same images for every model of one size, as `run` takes them."""
    entry = session.get_inputs()[0]
    images = np.random.default_rng(0).standard_normal((batch, *entry.shape[1:]), dtype=np.float32)
    return {entry.name: images}


def ready(file: Path, batch: int, threads: int) -> Callable[[], list[np.ndarray]]:
    """A run of `file` on random images with all of ONNX Runtime's optimisations."""
    options = quiet_options(GraphOptimizationLevel.ORT_ENABLE_ALL)
    options.intra_op_num_threads = threads
    # A session's threads would go on spinning while another session is timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = on_cpu(file, options)
    feed = random_images(session, batch)
    return lambda: session.run(None, feed)
