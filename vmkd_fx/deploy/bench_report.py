"""What a benchmark found: figures of each side, ratios, and beside each figure what was measured."""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from vmkd_fx.files import write_text
from vmkd_fx.steps import WIDTH
from vmkd_fx.table import table
from vmkd_fx.timing import Ratio

FORMAT = 1
BUNDLE = "bundle"

_HEADER = (
    "batch",
    "side",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "images/s",
    "MiB",
    "differs",
    "bundle takes",
    "95 % interval",
)


@dataclass(frozen=True)
class Setup:
    """What one side is and what its times include.

    Attributes:
        runtime: package and version.
        device: that it runs on.
        threads: of the processor that one batch is computed with; None where they do none of it.
        precision: that it computes in.
        transfers: copies between the processor's and the device's memory.
        cuda_graphs: whether batches are launched as one CUDA graph.
        preparation: of images; what of it is in the time.
        warm_up: what was run before.
    """

    runtime: str
    device: str
    threads: int | None
    precision: str
    transfers: str
    cuda_graphs: str
    preparation: str
    warm_up: str

    def __str__(self) -> str:
        threads = "" if self.threads is None else f", {self.threads} thread(s)"
        return (
            f"{self.runtime} on {self.device}{threads}; {self.precision}; transfers: {self.transfers}; CUDA "
            f"graphs: {self.cuda_graphs}; preparing images: {self.preparation}; warm-up: {self.warm_up}"
        )


@dataclass(frozen=True)
class Figures:
    """One side at one batch size; times in seconds.

    Attributes:
        batch: images.
        side: as in "torch".
        runs: batches that were timed.
        first: the first call, which loads and compiles what was put off.
        p50, p90: half, nine tenths of the batches took no longer.
        p99: the same of 99 in a hundred; None where fewer than a hundred were timed.
        images_per_second: one batch after the other, from the mean.
        difference: of the logits from the bundle's, over their largest; None for the bundle.
        memory: bytes at the peak, see `Bench.memory`; None where not measured.
        ratio: the bundle's median over this side's; None for the bundle.
    """

    batch: int
    side: str
    runs: int
    first: float
    p50: float
    p90: float
    p99: float | None
    images_per_second: float
    difference: float | None = None
    memory: int | None = None
    ratio: Ratio | None = None


@dataclass(frozen=True)
class Bench:
    """A benchmark of a bundle.

    Attributes:
        name, precision, graph: of the bundle; `graph` is the SHA-256 of its ONNX file.
        sides: what each side is, by name, the bundle's first.
        figures: by batch, then by side.
        skipped: sides that were not measured, and why.
        memory: what the figures of memory mean, in words; or why there are none.
        machine: processor, GPU and system.
        hints: what makes the figures less sure than they could be.
        settings: how it was measured.
        versions: of packages.

    `str(bench)` is a table, and what was measured below it.
    """

    name: str
    precision: str
    graph: str
    sides: dict[str, Setup]
    figures: tuple[Figures, ...]
    skipped: dict[str, str]
    memory: str
    machine: dict[str, str]
    hints: tuple[str, ...]
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; times are in milliseconds, memory in bytes."""
        results = [{**_in_ms(figures), "setup": asdict(self.sides[figures.side])} for figures in self.figures]
        bundle = {"name": self.name, "precision": self.precision, "onnx_sha256": self.graph}
        return {
            "format": FORMAT,
            "bundle": bundle,
            "machine": self.machine,
            "versions": self.versions,
            "settings": self.settings,
            "memory": self.memory,
            "results": results,
            "skipped": self.skipped,
            "hints": list(self.hints),
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            OutputError: `path` cannot be written.
        """
        write_text(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def __str__(self) -> str:
        lines = [f"{self.name} in {self.precision}", ""]
        lines += table(_HEADER, map(_cells, self.figures), right=_HEADER[:1] + _HEADER[2:]).splitlines()
        notes = [f"{side}: {setup}" for side, setup in self.sides.items()]
        notes += [f"not measured, {side}: {why}" for side, why in self.skipped.items()]
        notes += ["bundle takes: median of the bundle over that of the side; below one the bundle is faster"]
        notes += [f"MiB: {self.memory}", *(f"hint: {hint}" for hint in self.hints)]
        lines.append("")
        for note in notes:
            lines += textwrap.wrap(note, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
        return "\n".join(lines)


def _in_ms(figures: Figures) -> dict[str, Any]:
    times = {
        f"{name}_ms": None if value is None else 1e3 * value
        for name in ("first", "p50", "p90", "p99")
        for value in (getattr(figures, name),)
    }
    ratio = None if figures.ratio is None else asdict(figures.ratio)
    return {
        "batch": figures.batch,
        "side": figures.side,
        "runs": figures.runs,
        **times,
        "images_per_second": figures.images_per_second,
        "peak_memory_bytes": figures.memory,
        "difference": figures.difference,
        "ratio": ratio,
    }


def _cells(figures: Figures) -> tuple[object, ...]:
    times = (
        None if seconds is None else f"{1e3 * seconds:.3f}"
        for seconds in (figures.p50, figures.p90, figures.p99)
    )
    ratio = figures.ratio
    return (
        figures.batch,
        figures.side,
        *times,
        f"{figures.images_per_second:.1f}",
        None if figures.memory is None else f"{figures.memory / 2**20:.0f}",
        None if figures.difference is None else f"{figures.difference:.1e}",
        None if ratio is None else f"{ratio.value:.3f}",
        None if ratio is None else f"{ratio.low:.3f} to {ratio.high:.3f}",
    )
