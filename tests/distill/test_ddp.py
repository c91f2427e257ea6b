"""Two processes with half a batch each learn what one process learns from the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

import vmkd_fx as vx
from tests.models import images
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.graph.share import unwrapped
from vmkd_fx.models import register

WORLD = 2
BATCH = 8
RATES = {"drop_rate": 0.0, "drop_path_rate": 0.0, "proj_drop_rate": 0.0}
STUDENTS: dict[str, dict[str, Any]] = {
    "mixer_nano_32": {"num_blocks": 2, "embed_dim": 24},
    "deit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
}
CASES = (
    ("mixer_nano_32", "std"),
    ("deit_tiny_patch16_224", "std"),
    ("mixer_nano_32", "kd"),
    ("deit_tiny_patch16_224", "fitnet"),
    ("mixer_nano_32", "riformer"),
)
# Float64 rounds to 1e-16; sums over halves and over the whole batch differ in their order alone.
TOLERANCE = 1e-12


def task(name: str, method: str) -> DistillationTask:
    """The same in every process: weights off their zeros, no dropout, float64."""
    register()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    student = timm.create_model(name, num_classes=10, **STUDENTS[name], **RATES)
    nn.init.normal_(student.head.weight)
    if method == "riformer":
        teachers = [
            timm.create_model(name, num_classes=10, **{**STUDENTS[name], "embed_dim": 32}, **RATES).double()
        ]
    else:
        teachers = [timm.create_model("test_resnet", num_classes=10).double() for _ in range(2)]
    settings = {"layers": 1, "teacher_weights": False} if method == "riformer" else {}
    made = vx.wrap(student.double(), method, teachers, epochs=12, **settings).train()
    made.set_epoch(11)  # behind riformer's windows: its projections wait for nothing
    return made


def batch(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    return images(BATCH, dtype=torch.float64)[part], (torch.arange(BATCH) % 10)[part]


def gradients(trained: DistillationTask, part: slice) -> dict[str, torch.Tensor]:
    trained(*batch(part))["loss"].backward()
    parameters = unwrapped(trained.trainable_module).named_parameters()
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def half(rank: int) -> slice:
    return slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        for name, method in CASES:
            trained = task(name, method).prepare_distributed()
            torch.save(gradients(trained, half(rank)), Path(folder) / f"{name}-{method}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left their gradients of every case."""
    path = tmp_path_factory.mktemp("ddp")
    multiprocessing.spawn(process, args=(str(path),), nprocs=WORLD)
    return path


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, over all parameters."""
    assert list(one) == list(other)
    whole = torch.cat([gradient.flatten() for gradient in one.values()])
    return float((whole - torch.cat([g.flatten() for g in other.values()])).norm() / whole.norm())


@pytest.mark.parametrize(("name", "method"), CASES)
def test_two_processes_give_the_gradients_of_one(name: str, method: str, folder: Path) -> None:
    first, second = (torch.load(folder / f"{name}-{method}-{rank}.pt") for rank in range(WORLD))
    alone = task(name, method)
    expected = gradients(alone, slice(None))

    assert len(expected) == len(list(alone.trainable_module.parameters()))
    assert any(key.startswith("vmkd.") for key in expected) == (method != "kd")
    assert difference(first, second) == 0
    assert difference(expected, first) < TOLERANCE
    # One half alone teaches something else, so that the agreement is not for want of a difference.
    assert difference(expected, gradients(task(name, method), half(0))) > 0.1
