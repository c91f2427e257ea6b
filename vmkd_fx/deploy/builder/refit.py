"""Weights back into an engine that was built without them. Needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmkd_fx.deploy.builder.complaints import in_our_words
from vmkd_fx.errors import BuildError


def refit(trt: Any, messages: Any, engine: Any, graph: bytes, path: Path | None = None) -> None:
    """Put the weights of an ONNX graph into `engine`.

    Args:
        trt: the module of the package.
        messages: its collector.
        engine: deserialised, built stripped or refittable.
        graph: the ONNX file that it was built from, or one that differs in its weights alone.
        path: of that file, where its weights lie beside it.

    Raises:
        BuildError: the graph is another one, or the engine takes no weights.
    """
    messages.errors.clear()
    refitter = trt.Refitter(engine, messages)
    parser = trt.OnnxParserRefitter(refitter, messages)
    read = parser.refit_from_bytes(graph, str(path)) if path is not None else parser.refit_from_bytes(graph)
    if read and refitter.refit_cuda_engine():
        return
    errors = [parser.get_error(index).desc() for index in range(parser.num_errors)] + messages.errors
    reason = "; ".join(dict.fromkeys(map(in_our_words, errors))) or "no reason given"
    raise BuildError(f"the engine does not take the weights of the graph: {reason}; build it again")
