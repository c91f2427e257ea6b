"""Processes with an equal part of a batch each learn what one process learns from the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vmkd_fx as vx
from tests.distill.processes import Group
from tests.models import images
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.graph.share import unwrapped
from vmkd_fx.models import register

BATCH = 8
RATES = {"drop_rate": 0.0, "drop_path_rate": 0.0, "proj_drop_rate": 0.0}
DEIT = "deit_tiny_patch16_224"
STUDENTS: dict[str, dict[str, Any]] = {
    "mixer_nano_32": {"num_blocks": 2, "embed_dim": 24},
    DEIT: {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
}
# Student, method, settings, teachers: the student's own kind, wider, or residual networks.
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "mixer-std": ("mixer_nano_32", "std", {}, "resnets"),
    "mixer-std-information": ("mixer_nano_32", "std", {"information": 0.5}, "resnets"),
    "deit-std-information": (DEIT, "std", {"information": 0.5}, "resnets"),
    "mixer-kd": ("mixer_nano_32", "kd", {}, "resnet"),
    "deit-fitnet": (DEIT, "fitnet", {}, "resnets"),
    "deit-vitkd": (DEIT, "vitkd", {}, "wider"),
    "deit-cit": (DEIT, "cit", {}, "resnets"),
    "mixer-riformer": ("mixer_nano_32", "riformer", {"layers": 1, "teacher_weights": False}, "wider"),
}
# Float64 rounds to 1e-16; sums over parts and over the whole batch differ in their order alone.
TOLERANCE = 1e-12
MASKS = "vmkd.vitkd.generator"


def task(case: str) -> DistillationTask:
    """The same in every process: weights off their zeros, no dropout, float64."""
    register()
    name, method, settings, kind = CASES[case]
    torch.set_num_threads(1)
    torch.manual_seed(3)
    student = timm.create_model(name, num_classes=10, **STUDENTS[name], **RATES)
    nn.init.normal_(student.head.weight)
    if kind == "wider":
        wider = {**STUDENTS[name], "embed_dim": 32}
        teachers = [timm.create_model(name, num_classes=10, **wider, **RATES).double()]
    else:
        count = 2 if kind == "resnets" else 1
        teachers = [timm.create_model("test_resnet", num_classes=10).double() for _ in range(count)]
    made = vx.wrap(student.double(), method, teachers, epochs=12, **settings).train()
    made.set_epoch(11)  # behind riformer's windows: its projections wait for nothing
    for parameter_name, parameter in made.trainable_module.named_parameters():
        if "information" in parameter_name:
            nn.init.normal_(parameter, std=0.3)  # so that ψ differs from image to image
    return made


def batch(part: slice) -> tuple[Tensor, Tensor]:
    return images(BATCH, dtype=torch.float64)[part], (torch.arange(BATCH) % 10)[part]


def part_of(rank: int, size: int) -> slice:
    return slice(rank * BATCH // size, (rank + 1) * BATCH // size)


def learnt(trained: DistillationTask, part: slice, rank: int = 0, masks: Tensor | None = None) -> Any:
    """Gradients by name, buffers, and the masks that were drawn (B, N) where the method draws any."""
    module = unwrapped(trained.trainable_module)
    drawn: list[Tensor] = []
    hooks = []
    trained.zero_grad()
    if MASKS in dict(module.named_modules()):
        generator = module.get_submodule(MASKS)
        hooks.append(generator.register_forward_hook(lambda _, inputs, output: drawn.append(output[1])))
        if masks is not None:
            hooks.append(generator.register_forward_pre_hook(lambda _, inputs: (*inputs, masks)))
    torch.manual_seed(5 + rank)
    trained(*batch(part))["loss"].backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return gradients, {name: buffer.clone() for name, buffer in module.named_buffers()}, drawn


def process(rank: int, size: int, folder: Path) -> None:
    for case in CASES:
        trained = task(case).prepare_distributed()
        torch.save(learnt(trained, part_of(rank, size), rank), folder / f"{case}-{rank}.pt")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Where so many processes left what they learnt in every case."""
    folder, size = tmp_path_factory.mktemp("ddp"), request.param
    assert Group(folder, size, process, folder).wait() == [0] * size
    return folder, size


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, over all parameters."""
    assert list(one) == list(other)
    whole = torch.cat([gradient.flatten() for gradient in one.values()])
    return float((whole - torch.cat([g.flatten() for g in other.values()])).norm() / whole.norm())


@pytest.mark.parametrize("case", CASES)
def test_processes_give_the_gradients_of_one(case: str, folders: tuple[Path, int]) -> None:
    folder, size = folders
    found = [torch.load(folder / f"{case}-{rank}.pt") for rank in range(size)]
    masks = torch.cat([drawn[0] for _, _, drawn in found]) if found[0][2] else None
    alone = task(case)
    expected, buffers, _ = learnt(alone, slice(None), masks=masks)

    assert len(expected) == len(list(alone.trainable_module.parameters()))
    assert any(key.startswith("vmkd.") for key in expected) == (case != "mixer-kd")
    for gradients, own, _ in found:
        assert difference(found[0][0], gradients) == 0
        assert difference(expected, gradients) < TOLERANCE
        averages = [key for key in own if key.endswith("loss.average")]
        assert bool(averages) == ("information" in case)
        assert all(torch.allclose(own[key], buffers[key], rtol=0, atol=TOLERANCE) for key in averages)
    # One part alone teaches something else, so that the agreement is not for want of a difference.
    part = part_of(0, size)
    without = learnt(alone, part, masks=None if masks is None else masks[part])
    assert difference(expected, without[0]) > 0.1


def test_information_of_parts_is_not_that_of_the_whole(folders: tuple[Path, int]) -> None:
    """The mean over processes of each part's own mutual information has another gradient."""
    _, size = folders
    means: dict[str, Tensor] = {}
    for rank in range(size):
        for name, gradient in learnt(task("mixer-std-information"), part_of(rank, size))[0].items():
            means[name] = means.get(name, torch.zeros(())) + gradient / size
    expected = learnt(task("mixer-std-information"), slice(None))[0]
    assert difference(expected, means) > 1e-3
