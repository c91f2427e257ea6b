"""What a method costs over the plainer one that it stands on: time of a step and peak memory, side by side.

    python benchmarks/distillation_cost.py [--repetitions 5] [--batch 8] [--device cpu] [--out docs/papers.md]

Steps of each pair take turns in one process, so that both meet the same machine; the table has the medians
and their ratios. Weights are random, which changes neither. On a CPU, memory is what all tensors of a step
hold at once, weights and optimiser's state included, counted where they are made; buffers inside an operation
are not seen. On a GPU it is what its allocator reports.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from papers_page import check_page, markdown, write_between
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import vmkd_fx as vx
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.errors import VmkdError
from vmkd_fx.models import register
from vmkd_fx.progress import progress
from vmkd_fx.table import table

MARKER = "cost"
HEADER = ("method", "student", "teachers", "step", "peak memory", "step, ratio", "memory, ratio")
EPOCHS = 120


@dataclass(frozen=True)
class Pair:
    """A method and the plainer one that it is held against.

    Attributes:
        plain, method: presets.
        student, teachers: timm's names.
        plain_settings, method_settings: changes to the presets.
        epoch: which of 120 runs, for a method with a schedule.
    """

    plain: str
    method: str
    student: str
    teachers: tuple[str, ...]
    plain_settings: dict[str, Any] = field(default_factory=dict)
    method_settings: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0


_IMITATION = ("kd", "riformer", "riformer_s12", ("poolformer_s12",), {"alpha": 1.0}, {"replace": False})
PAIRS = (
    Pair("nkd", "vitkd+nkd", "deit_tiny_patch16_224", ("deit3_small_patch16_224",)),
    Pair("hard", "std", "mixer_s16_224", ("resnet50", "resnet101")),
    Pair(*_IMITATION),
    Pair(*_IMITATION, epoch=20),
)


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors seen by it held at once; what is there before is given to `count`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: set[int] = set()

    def count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._held:
            self._held.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)
        return tensor

    def _gone(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self.count, func(*args, **(kwargs or {})))


class Training:
    """Steps of one method on random images."""

    def __init__(self, pair: Pair, method: str, settings: dict[str, Any], batch: int, device: str) -> None:
        torch.manual_seed(0)
        student = timm.create_model(pair.student)
        teachers = [timm.create_model(name) for name in pair.teachers]
        self.task: DistillationTask = vx.wrap(
            student.to(device),
            method,
            [teacher.to(device) for teacher in teachers],
            epochs=EPOCHS,
            **settings,
        )
        self.task.set_epoch(pair.epoch)
        self.task.train()
        self.optimizer = torch.optim.AdamW(self.task.get_trainable_module().parameters(), lr=1e-4)
        size = self.task.get_trainable_module().info.need_input_size()
        self.images = torch.randn(batch, *size, device=device)
        self.targets = torch.randint(1000, (batch,), device=device)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.task(self.images, self.targets)["loss"].backward()
        self.optimizer.step()

    def seconds(self) -> float:
        """How long a step takes."""
        synchronise(self.images)
        started = time.perf_counter()
        self.step()
        synchronise(self.images)
        return time.perf_counter() - started

    def peak_bytes(self) -> int:
        """The most that a step holds at once."""
        self.optimizer.zero_grad()
        if self.images.is_cuda:
            standing = sum(tensor.untyped_storage().nbytes() for tensor in self._standing())
            others = torch.cuda.memory_allocated() - standing
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated() - others
        meter = PeakBytes()
        for tensor in self._standing():
            meter.count(tensor)
        with meter:
            self.step()
        return meter.peak

    def _standing(self) -> Iterator[Tensor]:
        """What is there between steps."""
        modules: tuple[nn.Module, ...] = (self.task.get_trainable_module(), self.task.teachers)
        for module in modules:
            yield from module.parameters()
            yield from module.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        yield self.images


def synchronise(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


def measured(pair: Pair, args: argparse.Namespace, done: Callable[[], None]) -> list[tuple[str, ...]]:
    """Two lines of the table, the plainer method first."""
    sides = ((pair.plain, pair.plain_settings), (pair.method, pair.method_settings))
    trainings = [Training(pair, *side, args.batch, args.device) for side in sides]
    for training in trainings:
        training.step()  # the first step makes the optimiser's state
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.repetitions):
        for training, found in zip(trainings, times, strict=True):
            found.append(training.seconds())
        done()
    peaks = [training.peak_bytes() for training in trainings]
    medians = [statistics.median(found) for found in times]
    lines = []
    for index, (method, _) in enumerate(sides):
        ratios = [f"{values[1] / values[0]:.2f}" if index else "" for values in (medians, peaks)]
        step, memory = f"{1000 * medians[index]:.0f} ms", f"{peaks[index] / 2**20:.0f} MiB"
        label = f"{method}, from epoch {pair.epoch} of {EPOCHS}" if method == "riformer" else method
        lines.append((label, pair.student, ", ".join(pair.teachers), step, memory, *ratios))
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what a method costs over a plainer one")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="page to write the table into")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    register()
    try:
        if args.out:
            check_page(args.out, MARKER)
        with progress(len(PAIRS) * args.repetitions, "steps of both") as bar:
            rows = [line for pair in PAIRS for line in measured(pair, args, bar.update)]
        where = (
            torch.cuda.get_device_name()
            if args.device != "cpu"
            else f"CPU, {torch.get_num_threads()} thread(s)"
        )
        how = f"{where}, batch {args.batch}, {args.repetitions} turns, torch {torch.__version__}"
        print(f"{table(HEADER, rows, right=HEADER[3:])}\n{how}")
        if args.out:
            text = f"Written by `benchmarks/distillation_cost.py`: {how}.\n\n{markdown(HEADER, rows)}"
            write_between(args.out, MARKER, text)
    except VmkdError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
