"""Running an ONNX graph in ONNX Runtime, on the processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.errors import BundleError
from vmkd_fx.extras import require
from vmkd_fx.target import Profile

_ANY = Profile(1, 8, 32)
_GIVE = "add_external_initializers_from_files_in_memory"


def takes_weights_from_memory() -> bool:
    """Whether ONNX Runtime does, for a graph whose weights lie beside it: so it is from 1.24 on."""
    runtime = require("onnxruntime", "onnxruntime", "running an ONNX graph")
    return hasattr(runtime.SessionOptions, _GIVE)


class OnnxBackend:
    """Called with images, it returns float32 logits (B, classes). Any number of threads may call it at once.

    Attributes:
        name: the package and its version.
        profiles: the batch sizes it takes.
    """

    includes = "ONNX Runtime alone, from arrays to arrays; preparing images is not in it"

    def __init__(
        self,
        onnx: Path | bytes,
        *,
        threads: int | None = None,
        weights: Mapping[str, bytes] | None = None,
        spin: bool = True,
    ) -> None:
        """Load the graph.

        Args:
            onnx: the file, or its contents.
            threads: that one batch is computed with; default: one a core.
            weights: contents of the files of external data, for a graph that is given by its contents and
                where `takes_weights_from_memory`.
            spin: threads without work wait busily, which is faster and takes the core from everything else.

        Raises:
            BundleError: ONNX Runtime refuses it.
            MissingExtraError: the extra `onnxruntime` is not installed.
        """
        runtime = require("onnxruntime", "onnxruntime", "running an ONNX graph")
        self.name = f"ONNX Runtime {runtime.__version__}"
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if not spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if weights:
            give = getattr(options, _GIVE)
            give(list(weights), list(weights.values()), [len(data) for data in weights.values()])
        try:
            self._session = runtime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            shown = onnx if isinstance(onnx, Path) else "the graph"
            raise BundleError(f"{self.name} cannot load {shown}: {error}") from error
        batch = self._session.get_inputs()[0].shape[0]
        self.profiles: tuple[Profile, ...] = (
            Profile(batch, batch, batch) if isinstance(batch, int) else _ANY,
        )

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits (B, classes) of a batch of the graph's own input."""
        logits: NDArray[np.float32] = self._session.run(["logits"], {"images": images})[0]
        return logits
