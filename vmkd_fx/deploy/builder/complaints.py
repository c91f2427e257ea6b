"""The library's complaints in our words: what was wrong, at which ONNX node, from which module.

Both packages report by a logger and by the parser's list of errors, in assertions of their own source. What
is known is translated by the table; what is not is handed on without its source paths.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from vmkd_fx.deploy.onnx_nodes import Graph, Node

# What a message holds, and what it means.
MEANINGS = (
    (r"Plugin not found|checkFallbackPluginImporter", "this version has no such operator"),
    (r"^false$|UNSUPPORTED_NODE$", "this version has the operator's name and does not support it"),
    (
        r"no tactics to implement the operation within workspace limit",
        "no kernel fits into the workspace that was allowed: give more, or leave the limit out",
    ),
    (
        r"status == CUDA_SUCCESS|CUDA driver version is insufficient|no CUDA-capable device",
        "it asked the GPU, and there is none that it can use here",
    ),
    (
        r"FP32 GEMM is not supported",
        "sm75 takes matrix products in half precision only, and this one is in float32",
    ),
    (r"HW-specific datatypes: b16", "one of the GPUs that were asked for has no bfloat16"),
    (
        r"Attention operation was not supported by a dedicated kernel",
        "there is no kernel for an Attention operator of this type and shape; export with opset=20",
    ),
    (r"Non-zero zero point", "int8 has no zero point but 0 there: quantise symmetrically"),
    (r"libnvinfer_lean", "the lean runtime, which version compatibility needs, is not installed"),
    (
        r"[Oo]ut of memory|OutOfMemory|Requested amount of GPU memory",
        "the GPU's memory is used up: free some, or build for smaller batches",
    ),
    (r"[Dd]uplicate|already exists.*profile", "two optimisation profiles contradict each other"),
)

_SOURCE = re.compile(r"\.? In (function )?\w+( at /\S+?)?(?=\)?$)")
_POSITION = re.compile(r"^(\w+::)?\w*: ?Error Code \d+: |^\[[\w.]+::[^\]]*\] ")


def collector(trt: Any) -> Any:
    """A logger of the package `trt` whose `errors` holds what was logged as an error, oldest first."""

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self._lock = threading.Lock()

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                with self._lock:
                    self.errors.append(_SOURCE.sub("", message))

    return Collector()


def in_our_words(message: str) -> str:
    """What `message` means, or the message without positions in the library's source."""
    for pattern, meaning in MEANINGS:
        if re.search(pattern, message):
            return meaning
    return _SOURCE.sub("", _POSITION.sub("", message.strip()))


def parsing(errors: Iterable[Any], graph: Graph) -> str:
    """What the parser refused, node by node.

    Args:
        errors: `ParserError`s.
        graph: the file that was parsed.
    """
    return "; ".join(dict.fromkeys(_parsing(errors, graph))) or "it gives no reason"


def building(messages: Iterable[str], graph: Graph) -> str:
    """What the builder refused, with the first node that a message names."""
    said = list(dict.fromkeys(messages))
    node = next((node for message in said for node in _named(message, graph)), None)
    words = "; ".join(dict.fromkeys(map(in_our_words, said))) or "it gives no reason"
    return f"{called(node, graph)}: {words}" if node is not None else words


def called(node: Node, graph: Graph) -> str:
    """As in "node 'node_softmax' (Softmax) after blocks.0.attn.qkv, before blocks.0.attn.proj"."""
    where = graph.where(node)
    place = f" {where}" if where.startswith(("after ", "before ")) else f" of {where}" if where else ""
    name = f"{node.name!r} ({node.operator})" if node.name else node.operator
    return f"node {name}{place}"


def _parsing(errors: Iterable[Any], graph: Graph) -> Iterator[str]:
    for error in errors:
        words = in_our_words(error.desc())
        node = graph.find(error.node_name())
        index = error.node()
        if (
            node is None
            and 0 <= index < len(graph.nodes)
            and graph.nodes[index].operator == error.node_operator()
        ):
            node = graph.nodes[index]
        yield f"{called(node, graph)}: {words}" if node is not None else words


def _named(message: str, graph: Graph) -> Iterator[Node]:
    for name in re.findall(r"'([^']+)'|\{[^{}]*?([\w./]+)[^{}]*\}|IShuffleLayer ([^:]+):", message):
        node = graph.find(next(part for part in name if part))
        if node is not None:
            yield node
