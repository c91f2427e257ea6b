"""For every preset a small student that it fits, and teachers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

import vmkd_fx as vx
from tests.models import small
from vmkd_fx.distill.task import DistillationTask

SHARED = {"img_size": 32, "patch_size": 8, "num_classes": 10}


def resnet() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=10)


def vit(name: str = "deit_tiny_patch16_224", **options: Any) -> nn.Module:
    """A small transformer, deeper and wider than the student by default."""
    torch.manual_seed(2)
    sizes = {**SHARED, "embed_dim": 32, "depth": 3, "num_heads": 2, **options}
    return timm.create_model(name, **sizes)


@dataclass(frozen=True)
class Pair:
    """A preset, the student's family, its teachers, and changed settings."""

    preset: str
    student: str = "deit"
    teachers: tuple[str, ...] = ("vit",)
    settings: dict[str, Any] = field(default_factory=dict)

    def make_student(self) -> nn.Module:
        if self.student == "distilled":
            return vit("deit_tiny_distilled_patch16_224", embed_dim=24, depth=2)
        return small(self.student)

    def make_teachers(self) -> list[nn.Module]:
        made = {"vit": vit, "resnet": resnet, "poolformer": lambda: small("poolformer")}
        return [made[name]() for name in self.teachers]

    def wrap(self, **options: Any) -> DistillationTask:
        """The task, at the first of twelve epochs."""
        options = {
            "student": self.make_student(),
            "teachers": self.make_teachers(),
            **self.settings,
            **options,
        }
        student, teachers = options.pop("student"), options.pop("teachers")
        task = vx.wrap(student, self.preset, teachers, epochs=12, **options)
        task.set_epoch(0)
        return task


PAIRS = (
    Pair("std", "mixer", ("resnet",)),
    Pair("std-intermediate", "mixer", ("resnet", "resnet")),
    Pair("vitkd"),
    Pair("vitkd+nkd"),
    Pair("riformer", "poolformer", ("poolformer",), {"layers": 2}),
    Pair("ccs", "mixer", (), {"groups": 4}),
    Pair("cit", "deit", ("resnet", "vit")),
    Pair("kd", "mixer", ("resnet",)),
    Pair("hard", "mixer", ("resnet",)),
    Pair("deit", "distilled", ("resnet",)),
    Pair("fitnet"),
    Pair("mgd"),
    Pair("dkd", "mixer", ("resnet",)),
    Pair("nkd", "mixer", ("resnet", "resnet")),
)
