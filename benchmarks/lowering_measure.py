"""All figures of one model, ours beside theirs; what fails is a reason among them."""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lowering_chains import opset_of, ours, theirs
from lowering_counts import bytes_moved, nodes, optimised
from lowering_latency import Latency, interleaved
from lowering_models import build
from lowering_runtime import ready
from torch import nn

from vmkd_fx.deploy.onnx_export import relative_error
from vmkd_fx.deploy.tensorrt import Network
from vmkd_fx.errors import ExportError

ENGINE = "tensorrt-rtx"
SIDES = ("ours", "theirs")
SAME = 1e-3
"""The most by which two right graphs differ in float32: some hundred roundings of 6e-8 each, of which random
norms in a row make a thousand times more."""

Pair = tuple[int | None, int | None]
"""Ours, theirs; None where it failed."""
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        runs: of each side at least, for the latency; 0 leaves it out.
        seconds: the latency of one model is measured for so long at least.
        batch: images of a run.
        threads: of ONNX Runtime.
        opset: of both ONNX files.
        engine: count TensorRT-RTX's layers.
    """

    runs: int
    seconds: float
    batch: int
    threads: int
    opset: int
    engine: bool


@dataclass
class Figures:
    """One model's figures; None where not asked for or not to be had.

    Attributes:
        opsets: that were written; torch's exporter falls back to another without an error.
        nodes, bytes, layers: ours and theirs; bytes are for one image.
        difference: the largest of the logits, over the largest logit.
        failed: what failed, and why.
    """

    model: str
    opsets: Pair = (None, None)
    nodes: Pair = (None, None)
    bytes: Pair = (None, None)
    layers: Pair = (None, None)
    latency: Latency | None = None
    difference: float | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(found: dict[str, Any]) -> Figures:
        pairs = {name: tuple(found[name]) for name in ("opsets", "nodes", "bytes", "layers")}
        latency = Latency(**found["latency"]) if found["latency"] else None
        return Figures(**{**found, **pairs, "latency": latency})


def measure(name: str, settings: Settings) -> Figures:
    """Take one model down both chains and count what comes out."""
    warnings.simplefilter("ignore")  # the exporter and onnxslim speak of every model at length
    logging.disable(logging.CRITICAL)
    figures = Figures(name)
    model = build(name)
    with tempfile.TemporaryDirectory() as folder:
        attempt = _Attempt(figures.failed, folder)
        files = _exported(model, settings, Path(folder), attempt)
        figures.opsets = _pair(files, lambda _, file: opset_of(file))
        graphs = [
            attempt(f"{side}, ONNX Runtime", optimised, file, Path(folder) / f"{side}.extended.onnx")
            for side, file in zip(SIDES, files, strict=True)
        ]
        if all(graph is not None for graph in graphs):
            figures.difference = attempt("difference", _difference, files, settings)
            if figures.difference is None:
                return figures
        figures.nodes = _pair(graphs, lambda _, graph: nodes(graph.graph))
        figures.bytes = _pair(graphs, lambda side, graph: attempt(f"{side}, bytes", bytes_moved, graph))
        if figures.difference is not None and settings.runs:
            figures.latency = attempt("latency", _latency, files, settings)
        if settings.engine:
            path = Path(folder) / "engine.onnx"
            lowered = attempt(f"ours, {ENGINE}", ours, model, ENGINE, path, settings.opset)
            figures.layers = _pair(
                [lowered, files[1]], lambda side, file: attempt(f"{side}, layers", _layers, file)
            )
    return figures


def _exported(
    model: nn.Module, settings: Settings, folder: Path, attempt: _Attempt
) -> tuple[Path | None, Path | None]:
    """The ONNX files, ours and theirs."""
    return (
        attempt("ours", ours, model, "onnxruntime", folder / "ours.onnx", settings.opset),
        attempt("theirs", theirs, model, folder / "theirs.onnx", settings.opset),
    )


def _difference(files: tuple[Path, Path], settings: Settings) -> float:
    """The largest relative difference of the logits of three images.

    Raises:
        ExportError: it is more than rounding explains; figures of two different functions say nothing.
    """
    found, expected = (ready(file, 3, settings.threads)() for file in files)
    difference = relative_error(found, expected)
    if not difference <= SAME:
        raise ExportError(f"the logits differ by {difference:.1e}, so the two are not the same model")
    return difference


def _latency(files: tuple[Path, Path], settings: Settings) -> Latency:
    runs = [ready(file, settings.batch, settings.threads) for file in files]
    return interleaved(*runs, settings.runs, settings.seconds)


def _layers(file: Path) -> int:
    return Network(ENGINE, file).layers


def _pair(values: Sequence[Any], count: Callable[[str, Any], int | None]) -> Pair:
    """`count` of both sides, where there is something to count."""
    first, second = (
        None if value is None else count(side, value) for side, value in zip(SIDES, values, strict=True)
    )
    return first, second


@dataclass(frozen=True)
class _Attempt:
    """Calls that may fail; without an argument that failed before they are not made."""

    failed: dict[str, str]
    folder: str

    def __call__(self, what: str, work: Callable[..., T], *args: Any) -> T | None:
        if any(arg is None for arg in args):
            return None
        try:
            return work(*args)
        except Exception as error:  # exporters raise anything
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = re.sub(r"\s+", " ", lines[0]) if lines else ""
            self.failed[what] = f"{type(error).__name__}: {reason.replace(self.folder, '')}"[:200]
            return None
