"""Teachers: frozen, in eval mode, fed with images as they know them, tapped where a method reads a feature.
What the user gives keeps its own mode and flags.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import timm
import torch
import torch.nn.functional as F
from torch import nn

from vmkd_fx.distill.methods import Source, Wanted
from vmkd_fx.errors import ModelError, UnknownNameError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.edit import LOGITS
from vmkd_fx.graph.info import ModelInfo, model_info
from vmkd_fx.graph.shapes import class_count
from vmkd_fx.graph.share import shared_view, unwrapped
from vmkd_fx.graph.trace import trace
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.passes.feature_taps import NAME as TAPS
from vmkd_fx.passes.feature_taps import tap
from vmkd_fx.passes.heads.features import resize_tokens, to_tokens

_logger = logging.getLogger(__name__)


class Teacher(nn.Module):
    """One teacher: images normalised for the student in, "logits" (B, C) and tapped features out, without
    gradients.

    Args:
        model: the teacher; its parameters are used where they are, its modes are left alone.
        student: what the student says about itself; mean, standard deviation and image size may differ from
            the teacher's.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: nn.Module, student: ModelInfo) -> None:
        super().__init__()
        self.info = model_info(model)
        self.model: nn.Module = shared_view(unwrapped(model)).eval()
        reference = reference_tensor(model)
        own_mean, own_std, mean, std = (
            torch.tensor(values, dtype=reference.dtype, device=reference.device).view(1, -1, 1, 1)
            for values in (self.info.mean, self.info.std, student.mean, student.std)
        )
        # (pixel - mean) / std for the student becomes (pixel - own_mean) / own_std in one product and sum.
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)
        self.same_normalisation = (self.info.mean, self.info.std) == (student.mean, student.std)
        self.resize = self._resize(student)
        self.student_size = student.need_input_size()
        self.wanted: dict[str, Wanted] = {}

    def _resize(self, student: ModelInfo) -> tuple[int, int] | None:
        own, theirs = self.info.input_size, student.input_size
        if not self.info.fixed_input_size or own is None or theirs is None or own[1:] == theirs[1:]:
            return None
        _logger.info(
            "teacher %s takes %s only: the student's %s images are resized for it",
            self.info.name,
            own,
            theirs,
        )
        return own[1], own[2]

    def source(self, features: bool = False) -> Source:
        """What methods know of it; with `features` it is traced, and its anatomy is there.

        Raises:
            TraceError: its forward cannot be written down as a graph.
        """
        size = self._own_size()
        if not features:
            return Source(self.info.name, size)
        self.model = trace(self.model, input_size=size).eval()
        return Source(self.info.name, size, anatomy(self.model))

    def read(self, wanted: Mapping[str, Wanted]) -> None:
        """Let features leave beside the logits, by name, as patch tokens (B, N, C) on the student's grid."""
        self.wanted = dict(wanted)
        self.model = tap(self.model, {name: one.place for name, one in wanted.items()}).eval()
        for name, one in wanted.items():
            if one.grid != one.student_grid:
                _logger.info(
                    "teacher %s: feature %s of %s patches is resized to the student's %s",
                    *(self.info.name, name, one.grid, one.student_grid),
                )

    def _own_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that reach the model."""
        channels, *edges = self.student_size
        height, width = self.resize or edges
        return channels, height, width

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        given, images = images.dtype, images.to(self.scale.dtype)
        if not self.same_normalisation:
            images = images * self.scale + self.shift
        if self.resize:
            images = F.interpolate(images, self.resize, mode="bicubic", antialias=True)
        found = self.model(images)
        if not isinstance(found, dict):
            return {LOGITS: found.to(given)}
        features = {name: self._brought(found[f"{TAPS}/{name}"], one) for name, one in self.wanted.items()}
        return {name: value.to(given) for name, value in ({LOGITS: found[LOGITS]} | features).items()}

    @staticmethod
    def _brought(feature: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        """A feature in the teacher's layout as patch tokens on the student's grid."""
        tokens = to_tokens(feature, wanted.layout, wanted.prefix_tokens)
        same = wanted.grid == wanted.student_grid
        return tokens if same else resize_tokens(tokens, wanted.grid, wanted.student_grid)


def make_teachers(
    teachers: Iterable[str | nn.Module], student: ModelInfo, num_classes: int | None
) -> nn.ModuleList:
    """Teachers from modules or from names of timm models with published weights.

    `num_classes` is what they must know; None where nothing but features are read.

    Raises:
        UnknownNameError: timm has no such model.
        ModelError: a teacher knows other classes than the student, or its published weights cannot be had.
    """
    return nn.ModuleList(
        Teacher(_teacher_module(teacher, student, num_classes), student) for teacher in teachers
    )


def _teacher_module(teacher: str | nn.Module, student: ModelInfo, num_classes: int | None) -> nn.Module:
    if isinstance(teacher, str):
        return _published(teacher, student, num_classes)
    if not isinstance(teacher, nn.Module):
        raise ModelError(f"a teacher is a module or the name of a timm model, got {type(teacher).__name__}")
    if num_classes is None:
        return teacher
    info = model_info(teacher)
    count = info.num_classes or class_count(teacher, info.input_size or student.need_input_size())
    _check_classes(info.name, count, student.name, num_classes)
    return teacher


def _published(name: str, student: ModelInfo, num_classes: int | None) -> nn.Module:
    if not timm.is_model(name.split(".")[0]):
        raise UnknownNameError("timm model", name, timm.list_models(), where="teacher")
    config = timm.get_pretrained_cfg(name)
    if config is not None and num_classes is not None:
        _check_classes(name, config.num_classes, student.name, num_classes)
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:
        raise ModelError(
            f"teacher {name!r}: its published weights cannot be loaded ({type(error).__name__}: {error}); "
            "pass a module that holds weights, or in a recipe give the teacher a checkpoint"
        ) from error


def _check_classes(teacher: str, count: int, student: str, num_classes: int) -> None:
    if count != num_classes:
        raise ModelError(
            f"teacher {teacher} knows {count} classes and student {student} {num_classes}; "
            f"create the student with num_classes={count}, or train a teacher on the student's classes"
        )
