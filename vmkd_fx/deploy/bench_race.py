"""The sides of a benchmark, made ready and measured in turns."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.deploy.bench_machine import clock, machine, usual_threads
from vmkd_fx.deploy.bench_memory import ON_CPU, ON_GPU, can_measure, peak_memory
from vmkd_fx.deploy.bench_report import BUNDLE, Figures, Setup
from vmkd_fx.deploy.bench_sides import (
    NEED_MODEL,
    Call,
    images_of,
    runner_setup,
    runner_side,
    runs_on_gpu,
    side_named,
    torch_setup,
)
from vmkd_fx.deploy.onnx_file import first_line
from vmkd_fx.deploy.precision.agreement import compared
from vmkd_fx.errors import DataError, VmkdError
from vmkd_fx.extras import require
from vmkd_fx.progress import Progress, progress
from vmkd_fx.timing import Times, in_turns, ratio_of

if TYPE_CHECKING:
    from vmkd_fx.graph.traced import TracedModule

LEAST_RUNS = 20
"""Fewer say nothing of a ninetieth percentile, and little of a ratio."""

RUNS_FOR_P99 = 100
MOST_BATCHES = 8
"""torch compiles one function for so many shapes and no more."""


@dataclass(frozen=True)
class Settings:
    """How a benchmark is measured.

    Attributes:
        batches: sizes, each measured by itself.
        runs: of each side at each size, at least.
        seconds: each size is measured for so long at least.
        warm_up: runs of each side before, after the first one.
        threads: of the processor, for ONNX Runtime and torch alike; by default OMP_NUM_THREADS, or one a
            core.
        memory: measure it, which takes a process a side.
    """

    batches: tuple[int, ...] = (1, 8)
    runs: int = 100
    seconds: float = 0.0
    warm_up: int = 5
    threads: int = field(default_factory=usual_threads)
    memory: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(sorted(set(self.batches))))
        if self.runs < LEAST_RUNS:
            raise DataError(f"{self.runs} runs are too few to say anything: at least {LEAST_RUNS} are needed")
        if not self.batches or self.batches[0] < 1 or len(self.batches) > MOST_BATCHES:
            raise DataError(f"batch sizes {self.batches}: one to {MOST_BATCHES} whole numbers from one up")
        if self.threads < 1 or self.warm_up < 1 or not self.seconds >= 0:
            raise DataError(
                f"threads={self.threads}, warm_up={self.warm_up}, seconds={self.seconds}: "
                "threads and warm-up are 1 or more, seconds 0 or more"
            )


class Race:
    """The sides, ready to run, and what became of those that are not.

    Attributes:
        setups: what each side is.
        skipped: sides that could not be made or run, and why.
        clocks: of the GPU, read while it was warm.
    """

    def __init__(self, path: str, device: str, settings: Settings) -> None:
        self._path, self._device, self._settings = path, device, settings
        self._warm = f"the first run and {settings.warm_up} more"
        self.machine = machine()
        call, runner = runner_side(path, device, settings.threads)
        self.on_gpu = runs_on_gpu(runner)
        self.manifest = runner.bundle.manifest
        self._module: TracedModule | None = None
        self._calls: dict[str, Call] = {BUNDLE: call}
        self.setups: dict[str, Setup] = {
            BUNDLE: runner_setup(runner, self.machine, settings.threads, self._warm)
        }
        self.skipped: dict[str, str] = {}
        self.clocks: list[int] = []

    @property
    def torch_threads(self) -> int:
        """That torch computes with on the processor; 0 where it does not."""
        in_torch = not self.on_gpu and any(name in self.setups for name in NEED_MODEL)
        return self._settings.threads if in_torch else 0

    def take_model(self, model: Any, predict: str) -> None:
        """Strip a copy of the model, for the sides in torch."""
        require("torch", "train", "measuring the model in torch")
        from vmkd_fx.passes.pipeline import strip

        self._module = strip(model, predict, copy=True).eval()

    def enter(self, name: str) -> None:
        """Make the side of that name, or note why not."""
        if name in NEED_MODEL and self._module is None:
            self.skipped[name] = "the model was not given (vmkd bench BUNDLE MODEL_OR_CHECKPOINT)"
            return
        if name == "onnxruntime" and not self.on_gpu:
            self.skipped[name] = "it is what runs the bundle here"
            return
        threads = self._settings.threads
        try:
            call, runner = side_named(name, self._path, self._module, self._device, self.on_gpu, threads)
        except VmkdError as error:
            self.skipped[name] = str(error)
            return
        self._calls[name] = call
        if runner is not None:
            self.setups[name] = runner_setup(runner, self.machine, threads, self._warm)
        elif self._module is not None:
            self.setups[name] = torch_setup(
                self.manifest,
                self.machine,
                compiled=name == "compile",
                on_gpu=self.on_gpu,
                threads=threads,
                warm_up=self._warm,
            )

    def measured(self, batch: int, bar: Progress[int]) -> list[Figures]:
        """A row a side."""
        images = images_of(self.manifest, batch)
        firsts: dict[str, tuple[float, NDArray[np.float32]]] = {}
        for name in list(self._calls):
            try:
                started = time.perf_counter()
                logits = self._calls[name](images)
                firsts[name] = (time.perf_counter() - started, logits)
            except Exception as error:  # compilers raise anything
                if name == BUNDLE:
                    raise
                self.skipped[name] = f"batch {batch}: {type(error).__name__}: {first_line(error)}"
                del self._calls[name]
        calls = {name: partial(call, images) for name, call in self._calls.items()}
        for call in [*calls.values()] * self._settings.warm_up:
            call()
        self._read_clock()
        times = in_turns(calls, turns=self._settings.runs, seconds=self._settings.seconds, after=bar.update)
        self._read_clock()
        return [_figures(name, batch, firsts, times) for name in calls]

    def with_memory(self, rows: list[Figures], show: bool) -> tuple[list[Figures], str]:
        """The rows with the peaks of memory, and what these mean, in words."""
        if not self._settings.memory:
            return rows, "not asked for"
        if not can_measure(self.on_gpu):
            return rows, "not measured: this system does not say what a process took"
        peaks: dict[str, dict[int, int]] = {}
        faults = []
        for name in progress(list(self._calls), "memory", show=show):
            try:
                peaks[name] = peak_memory(
                    name,
                    self._path,
                    self._module,
                    self._settings.batches,
                    device=self._device,
                    on_gpu=self.on_gpu,
                    threads=self._settings.threads,
                )
            except VmkdError as error:
                faults.append(str(error))
        rows = [replace(row, memory=peaks.get(row.side, {}).get(row.batch)) for row in rows]
        return rows, "; ".join([ON_GPU if self.on_gpu else ON_CPU, *faults])

    def _read_clock(self) -> None:
        if self.on_gpu and (found := clock()) is not None:
            self.clocks.append(found)


def _figures(
    name: str, batch: int, firsts: dict[str, tuple[float, NDArray[np.float32]]], times: dict[str, Times]
) -> Figures:
    taken = times[name]
    p50, p90, p99 = (float(value) for value in np.percentile(taken, (50, 90, 99)))
    rival = name != BUNDLE
    return Figures(
        batch=batch,
        side=name,
        runs=len(taken),
        first=firsts[name][0],
        p50=p50,
        p90=p90,
        p99=p99 if len(taken) >= RUNS_FOR_P99 else None,
        images_per_second=batch / float(taken.mean()),
        difference=_difference(firsts[name][1], firsts[BUNDLE][1]) if rival else None,
        ratio=ratio_of(times[BUNDLE], taken) if rival else None,
    )


def _difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float | None:
    """Relative, of logits; None where they cannot be compared."""
    if found.shape != expected.shape:
        return None
    error = compared(found, expected)[0]
    return error if np.isfinite(error) else None
