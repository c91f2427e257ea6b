"""What the wrapped task costs over a loop written by hand: time of a step and peak memory, side by side.

    python benchmarks/task_overhead.py [--repetitions 9] [--batch 4] [--device cpu]

The hand-written side runs timm's own student and teachers, not traced, collects features by forward hooks,
and calls the same heads and the same losses on them. Both sides share every parameter and the optimiser, and
must give the same loss before anything is measured. Steps take turns in one process, and which side begins
alternates; the ratio is the median of the turns' ratios. On a CPU the time is that of this process, so that
a busy machine disturbs less, and memory is what tensors hold, counted where they are made; on a GPU they are
the clock's and the allocator's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import timm
import torch
from distillation_cost import PeakBytes, synchronise
from torch import Tensor, nn
from torch.nn import functional as F

import vmkd_fx as vx
from vmkd_fx.distill.losses import (
    HardDistillation,
    ModuleImitationLoss,
    SoftDistillation,
    TeacherLoss,
    ViTKDLoss,
)
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.models import register
from vmkd_fx.progress import progress
from vmkd_fx.table import table

HEADER = ("method", "student", "teachers", "by hand", "task", "time, ratio", "memory, ratio")
TIME, MEMORY = 1.03, 1.01
"""The most that the task may cost, as a multiple of the hand-written loop."""
EPOCHS = 120
AGREEMENT = 1e-5


class Hooked:
    """A module whose named parts leave what they return in `found`, by forward hooks."""

    def __init__(self, module: nn.Module, parts: Sequence[str]) -> None:
        self.module, self.found = module, {}
        for part in parts:
            module.get_submodule(part).register_forward_hook(self._keep(part))

    def _keep(self, part: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.found[part] = output

        return hook

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.found = {}
        logits = self.module(images)
        return logits, self.found


def for_teacher(images: Tensor, task: DistillationTask, place: int) -> Tensor:
    """Images as a teacher knows them."""
    teacher = task.teachers[place]
    return images if teacher.same_normalisation else images * teacher.scale + teacher.shift


class Std:
    """Spatial and channel tokens behind the last block, a head a teacher, hard labels of two teachers."""

    preset, student, teachers = "std", "mixer_s16_224", ("resnet50", "resnet101")
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, task: DistillationTask, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        self.task, self.teachers_by_hand = task, teachers
        last = f"blocks.{len(student.blocks) - 1}"
        self.last, self.hooked = last, Hooked(student, [last])
        module = task.trainable_module
        self.heads = [
            (
                module.get_submodule(f"vmkd.std.teacher_{place}.tokens"),
                module.get_submodule(f"vmkd.std.teacher_{place}.head"),
            )
            for place in range(len(teachers))
        ]
        self.distillation = TeacherLoss(HardDistillation(), "negative_entropy")

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        logits, found = self.hooked(images)
        heads = torch.stack([head(tokens(found[self.last])) for tokens, head in self.heads])
        with torch.no_grad():
            said = torch.stack(
                [
                    teacher(for_teacher(images, self.task, place))
                    for place, teacher in enumerate(self.teachers_by_hand)
                ]
            )
        return 0.5 * F.cross_entropy(logits, targets) + 0.5 * self.distillation(heads, said).sum()


class ViTKD:
    """Two shallow features are mimicked, the last one is generated."""

    preset, student, teachers = "vitkd", "deit_tiny_patch16_224", ("deit3_small_patch16_224",)
    settings: ClassVar[dict[str, Any]] = {}
    parts = ("blocks.0", "blocks.1", "norm")

    def __init__(self, task: DistillationTask, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        self.task = task
        self.hooked, self.theirs = Hooked(student, self.parts), Hooked(teachers[0], self.parts)
        heads = task.trainable_module.get_submodule("vmkd.vitkd")
        self.mimics, self.generator = (heads.shallow_0, heads.shallow_1), heads.generator
        self.distillation = ViTKDLoss()

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        logits, found = self.hooked(images)
        shallow = [mimic(found[part]) for mimic, part in zip(self.mimics, self.parts, strict=False)]
        generated, mask = self.generator(found["norm"])
        with torch.no_grad():
            _, said = self.theirs(for_teacher(images, self.task, 0))
        patches = {part: feature[:, 1:] for part, feature in said.items()}
        parts = self.distillation(
            shallow, [patches["blocks.0"], patches["blocks.1"]], generated, mask, patches["norm"]
        )
        return F.cross_entropy(logits, targets) + parts.mimicking + parts.generation


class RIFormer:
    """Four blocks and their affines imitate those of a PoolFormer, and the logits do."""

    preset, student, teachers = "riformer", "riformer_s12", ("poolformer_s12",)
    settings: ClassVar[dict[str, Any]] = {"replace": False, "teacher_weights": False}

    def __init__(self, task: DistillationTask, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        self.task = task
        receipt = task.trainable_module.receipts[-1]
        blocks = [name for name, part in student.named_modules() if hasattr(part, "token_mixer")]
        self.chosen = [blocks[index] for index in receipt.config["layers"]]
        places = [part for block in self.chosen for part in (block, f"{block}.token_mixer")]
        self.hooked, self.theirs = Hooked(student, places), Hooked(teachers[0], places)
        heads = task.trainable_module.get_submodule("vmkd.imitation")
        self.heads = {
            kind: [getattr(heads, f"{kind}_{place}") for place in range(len(self.chosen))]
            for kind in ("input", "output", "relation")
        }
        self.soft, self.imitation = SoftDistillation(1.0), ModuleImitationLoss()

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        logits, found = self.hooked(images)
        left, mixed = [found[block] for block in self.chosen], self._mixed(found)
        mine = {
            kind: [head(feature) for head, feature in zip(self.heads[kind], features, strict=True)]
            for kind, features in (("input", left), ("output", mixed), ("relation", left))
        }
        with torch.no_grad():
            said, theirs = self.theirs(for_teacher(images, self.task, 0))
        outputs = [theirs[block].flatten(2).transpose(1, 2) for block in self.chosen]
        works = [feature.flatten(2).transpose(1, 2) for feature in self._mixed(theirs)]
        parts = self.imitation(mine["input"], outputs, mine["output"], works, mine["relation"], outputs)
        return self.soft(logits, said).mean() + parts.input + parts.output + parts.relation

    def _mixed(self, found: dict[str, Tensor]) -> list[Tensor]:
        return [found[f"{block}.token_mixer"] for block in self.chosen]


CASES = (Std, ViTKD, RIFormer)


@dataclass(frozen=True)
class Side:
    """One way to compute the loss of a step."""

    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    images: Tensor

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def seconds(self) -> float:
        synchronise(self.images)
        clock = time.perf_counter if self.images.is_cuda else time.process_time
        started = clock()
        self.step()
        synchronise(self.images)
        return clock() - started

    def peak_bytes(self, standing: Sequence[Tensor]) -> int:
        self.optimizer.zero_grad()
        if self.images.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated()
        meter = PeakBytes()
        for tensor in standing:
            meter.count(tensor)
        with meter:
            self.step()
        return meter.peak


def sides_of(case: Any, batch: int, device: str) -> tuple[Side, Side, list[Tensor]]:
    """The hand-written side, the task's, and the tensors that are there between steps."""
    torch.manual_seed(0)
    student = timm.create_model(case.student).to(device).train()
    teachers = [timm.create_model(name).to(device).eval().requires_grad_(False) for name in case.teachers]
    task = vx.wrap(student, case.preset, teachers, epochs=EPOCHS, **case.settings).train()
    task.set_epoch(0)
    images = torch.randn(batch, *task.trainable_module.info.need_input_size(), device=device)
    targets = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=1e-5)
    by_hand = case(task, student, teachers)
    sides = (
        Side(lambda: by_hand.loss(images, targets), optimizer, images),
        Side(lambda: task(images, targets)["loss"], optimizer, images),
    )
    losses = []
    for side in sides:
        torch.manual_seed(1)
        losses.append(side.loss().item())
    if abs(losses[0] - losses[1]) > AGREEMENT * abs(losses[0]):
        raise SystemExit(f"{case.preset}: the loss by hand is {losses[0]} and the task's {losses[1]}")
    sides[0].step()  # the first step makes the optimiser's state
    standing = [*task.parameters(), *task.buffers(), images]
    standing += [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
    return *sides, standing


def measured(case: Any, args: argparse.Namespace, done: Callable[[], None]) -> tuple[list[str], bool]:
    """A line of the table, and whether the task costs no more than it may."""
    by_hand, task, standing = sides_of(case, args.batch, args.device)
    turns: list[tuple[float, float]] = []
    for turn in range(args.repetitions):
        if turn % 2:
            second = task.seconds()
            turns.append((by_hand.seconds(), second))
        else:
            turns.append((by_hand.seconds(), task.seconds()))
        done()
    peaks = [side.peak_bytes(standing) for side in (by_hand, task)]
    ratios = statistics.median(one / other for other, one in turns), peaks[1] / peaks[0]
    medians = [statistics.median(side) for side in zip(*turns, strict=True)]
    line = [case.preset, case.student, ", ".join(case.teachers)]
    line += [
        f"{1000 * seconds:.0f} ms, {peak / 2**20:.0f} MiB"
        for seconds, peak in zip(medians, peaks, strict=True)
    ]
    return [*line, *(f"{ratio:.3f}" for ratio in ratios)], ratios[0] <= TIME and ratios[1] <= MEMORY


def main() -> int:
    parser = argparse.ArgumentParser(description="the wrapped task's step against a loop written by hand")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    register()
    with progress(len(CASES) * args.repetitions, "steps of both") as bar:
        found = [measured(case, args, bar.update) for case in CASES]
    where = (
        torch.cuda.get_device_name() if args.device != "cpu" else f"CPU, {torch.get_num_threads()} thread(s)"
    )
    print(table(HEADER, [line for line, _ in found], right=HEADER[3:]))
    print(f"{where}, batch {args.batch}, {args.repetitions} turns, torch {torch.__version__}")
    within = all(good for _, good in found)
    print(f"time at most {TIME} and memory at most {MEMORY} times the hand-written loop: {within}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
