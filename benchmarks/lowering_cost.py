"""What the compiler costs: trace, wrap, lower and verify of a model beside its ONNX export, in one run.

    python benchmarks/lowering_cost.py [MODEL] [REPETITIONS]

Prints the median of interleaved repetitions and their ratio; below one, the proof of every step costs less
than the export that follows it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
from torch import nn

import vmkd_fx as vx
from vmkd_fx.table import table


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(name: str = "mixer_b16_224", repetitions: str = "3") -> None:
    student = timm.create_model(name)
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, student.num_classes))
    plain = vx.lower(student)

    def compile_and_prove() -> None:
        vx.lower(vx.wrap(vx.trace(student), "std", [teacher]))

    def export() -> None:
        with tempfile.TemporaryDirectory() as folder:
            vx.export(plain, Path(folder) / "m.onnx")

    times: dict[str, list[float]] = {"trace, wrap, lower, verify": [], "ONNX export, checked": []}
    for _ in range(int(repetitions)):
        for label, work in zip(times, (compile_and_prove, export), strict=True):
            times[label].append(seconds(work))
    rows = [
        (label, f"{statistics.median(t):.2f} s", f"{min(t):.2f}-{max(t):.2f}") for label, t in times.items()
    ]
    print(f"{name}, {repetitions} interleaved repetitions")
    print(table(("what", "median", "range"), rows, right=("median",)))
    ours, theirs = (statistics.median(t) for t in times.values())
    print(f"ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
