"""Steps per second with a teacher's cache beside the live teacher, and what the cache takes.

    python benchmarks/teacher_cache.py [--student deit_tiny_patch16_224] [--teacher resnet50] [--batch 8]

One student of ImageNet's size learns by plain distillation from the same random images: from the teacher
itself, from a cache with all its classes, from one with its top 100, and from the labels alone. All four take
turns in one process. A step with a cache looks its rows up, holds every image to its sketch and makes logits
of the rows, as in training. Images are there already, so the figures are those of the step and not of
loading; weights are random, which changes no time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

import vmkd_fx as vx
from vmkd_fx.distill.cache.folder import CacheFolder, Manifest
from vmkd_fx.distill.cache.form import INDEX, SKETCH, Form
from vmkd_fx.distill.cache.identity import teacher_identity
from vmkd_fx.distill.cache.report import TINYVIT_BYTES
from vmkd_fx.distill.cache.shards import read_shard, write_shard
from vmkd_fx.distill.cache.sketch import sketch
from vmkd_fx.distill.cache.teacher import CachedTeacher
from vmkd_fx.distill.data import Batch
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.distill.teachers import Teacher
from vmkd_fx.errors import VmkdError
from vmkd_fx.models import register
from vmkd_fx.progress import progress
from vmkd_fx.table import table
from vmkd_fx.timing import in_turns, ratio_of, seconds_of

CLASSES, BATCHES, ROWS = 1000, 4, 8192
FORMS = {"all classes": Form(CLASSES), "top 100": Form(CLASSES, 100)}
LIVE, NONE = "live teacher", "no teacher"


def batches(size: int, pixels: tuple[int, int, int]) -> list[Batch]:
    """Random images, each with a number of its own."""
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randn(size, *pixels, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
            torch.arange(place * size, (place + 1) * size),
        )
        for place in range(BATCHES)
    ]


def cache(path: Path, form: Form, teacher: Teacher, images: list[Batch]) -> CacheFolder:
    """The teacher's outputs for one epoch, in a file of as many rows as those of ImageNet have."""
    manifest = Manifest(teacher_identity(teacher), {"input_size": (3, 224, 224)}, {}, ROWS, ROWS, form)
    folder = CacheFolder.create(path, manifest)
    logits = torch.cat([teacher(batch.images)["logits"] for batch in images])
    columns = form.encode({"logits": logits})
    columns[SKETCH] = torch.cat([sketch(batch.images) for batch in images]).numpy()
    filled = {name: np.resize(rows, (ROWS, *rows.shape[1:])) for name, rows in columns.items()}
    write_shard(folder.file(0, 0), {**filled, INDEX: np.arange(ROWS, dtype=np.int32)}, folder.about(0, 0))
    return folder


def stepper(student: str, teachers: list[nn.Module], given: list[Batch]) -> Callable[[], None]:
    """A function that takes one step of a training of its own, batch after batch."""
    torch.manual_seed(0)
    model = timm.create_model(student)
    task = vx.wrap(model, "kd", teachers) if teachers else DistillationTask(vx.trace(model), [])
    task.train()
    task.set_epoch(0)
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=1e-4)
    place = 0

    def step() -> None:
        nonlocal place
        batch = given[place % len(given)]
        place += 1
        optimizer.zero_grad()
        task(batch.images, batch.targets, batch.indices)["loss"].backward()
        optimizer.step()

    step()  # the first step makes the optimiser's state and opens the cache
    return step


def measure(args: argparse.Namespace, folder: Path) -> str:
    torch.manual_seed(1)
    model = timm.create_model(args.teacher).eval()
    info = vx.trace(timm.create_model(args.student)).info
    images = batches(args.batch, info.need_input_size())
    teacher = Teacher(model, info)
    folders = {
        name: cache(folder / str(at), form, teacher, images) for at, (name, form) in enumerate(FORMS.items())
    }
    steps = {LIVE: stepper(args.student, [model], images)}
    for name, made in folders.items():
        steps[name] = stepper(args.student, [CachedTeacher(made.path)], images)
    steps[NONE] = stepper(args.student, [], images)
    with progress(args.turns, "turns of four steps") as bar:
        times = in_turns(steps, turns=args.turns, after=bar.update)
    rows = []
    for name, taken in times.items():
        ratio = ratio_of(times[LIVE], taken)
        sizes = [str(FORMS[name].bytes_per_image)] if name in FORMS else [""]
        speed = f"{1 / np.median(taken):.3f}"
        rows.append((name, speed, f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})", *sizes))
    header = ("outputs from", "steps/s", "times as fast as live", "bytes an image and epoch")
    lines = [table(header, rows, right=header[1:])]
    for name, made in folders.items():
        opening = min(
            seconds_of(lambda made=made: read_shard(made.file(0, 0), made.about(0, 0))) for _ in range(3)
        )
        whole = FORMS[name].bytes_per_image * 1_281_167 * 90 / 1e9
        lines.append(
            f"{name}: a file of {ROWS} rows is read and checked in {1000 * opening:.0f} ms; "
            f"ImageNet-1k for 90 epochs takes {whole:.0f} GB"
        )
    lines.append(
        f"TinyViT's cache: {TINYVIT_BYTES} bytes an image and epoch (top 100), 499 GB for 90 epochs of "
        "ImageNet-22k"
    )
    lines.append(
        f"{args.student} learns from {args.teacher}, batch {args.batch}, {args.turns} turns, CPU, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="a teacher's cache beside the live teacher")
    parser.add_argument("--student", default="deit_tiny_patch16_224")
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    register()
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(args, Path(folder)))
    except VmkdError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
