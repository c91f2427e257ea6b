"""Teachers: frozen, in eval mode, fed with images as they know them, tapped where a method reads a feature.
What the user gives keeps its own mode and flags.

One forward gives the logits and everything that is tapped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from vmkd_fx.distill.cache.teacher import CachedTeacher
from vmkd_fx.distill.class_maps import gathered
from vmkd_fx.distill.methods import Source, Wanted
from vmkd_fx.distill.teacher_spec import TeacherSpec
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
    gradients, in the images' precision and on their device.

    Args:
        given: the teacher; its parameters are used where they are, its modes are left alone. A `TeacherSpec`
            says how it is run.
        student: what the student says about itself; mean, standard deviation and image size may differ from
            the teacher's.

    Raises:
        ModelError: images of the size that `given` names do not fit it.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    classes: torch.Tensor | None

    def __init__(self, given: nn.Module | TeacherSpec, student: ModelInfo) -> None:
        super().__init__()
        spec = given if isinstance(given, TeacherSpec) else TeacherSpec(given)
        if not isinstance(spec.model, nn.Module):
            raise TypeError(f"a name is made a module by make_teachers, got {spec.model!r}")
        self.info = model_info(spec.model)
        self.model: nn.Module = shared_view(spec.placed(unwrapped(spec.model))).eval()
        self.stays, self.own_precision = spec.device is not None, spec.dtype is not None
        reference = reference_tensor(self.model)
        self.dtype = reference.dtype
        # Half precision has too few digits for the change of normalisation.
        wide = torch.promote_types(self.dtype, torch.float32) if self.own_precision else self.dtype
        own_mean, own_std, mean, std = (
            torch.tensor(values, dtype=wide, device=reference.device).view(1, -1, 1, 1)
            for values in (self.info.mean, self.info.std, student.mean, student.std)
        )
        # (pixel - mean) / std for the student becomes (pixel - own_mean) / own_std in one product and sum.
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)
        kept = None if spec.classes is None else torch.tensor(spec.classes, device=reference.device)
        self.register_buffer("classes", kept, persistent=False)
        self.same_normalisation = (self.info.mean, self.info.std) == (student.mean, student.std)
        self.resize = self._resize(student, spec.image_size)
        self.student_size = student.need_input_size()
        self.wanted: dict[str, Wanted] = {}
        if spec.compile:
            self.compile()

    def _resize(self, student: ModelInfo, asked: int | None) -> tuple[int, int] | None:
        own, theirs = self.info.input_size, student.input_size
        if asked is None:
            size = own[1:] if self.info.fixed_input_size and own is not None else None
        elif self.info.fixed_input_size and own is not None and own[1:] != (asked, asked):
            raise ModelError(
                f"teacher {self.info.name} takes images of {own[1]} x {own[2]} and image_size is {asked}; "
                f"leave it out, or create the teacher for that size (options: {{img_size: {asked}}})"
            )
        else:
            size = (asked, asked)
        if size is None or theirs is None or size == theirs[1:]:
            return None
        _logger.info(
            "teacher %s: the student's images of %d x %d are resized to %d x %d for it",
            *(self.info.name, *theirs[1:], *size),
        )
        return size[0], size[1]

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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Teacher:
        """What `.to()`, `.half()` and `.cuda()` do: a device or precision of its own is kept."""
        if self.stays:
            return self
        if self.own_precision:
            return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)
        super()._apply(fn, recurse)
        self.dtype = self.scale.dtype
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        given, images = images, images.to(self.scale)
        if not self.same_normalisation:
            images = images * self.scale + self.shift
        if self.resize:
            images = F.interpolate(images, self.resize, mode="bicubic", antialias=True)
        with self._precision(images.device.type):
            found = self.model(images.to(self.dtype))
        found = found if isinstance(found, dict) else {LOGITS: found}
        logits = found[LOGITS] if self.classes is None else gathered(found[LOGITS], self.classes)
        features = {name: self._brought(found[f"{TAPS}/{name}"], one) for name, one in self.wanted.items()}
        return {name: value.to(given) for name, value in ({LOGITS: logits} | features).items()}

    def _precision(self, device: str) -> AbstractContextManager[Any]:
        return torch.autocast(device, enabled=False) if self.own_precision else nullcontext()

    @staticmethod
    def _brought(feature: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        """A feature in the teacher's layout as patch tokens on the student's grid."""
        tokens = to_tokens(feature, wanted.layout, wanted.prefix_tokens)
        same = wanted.grid == wanted.student_grid
        return tokens if same else resize_tokens(tokens, wanted.grid, wanted.student_grid)


def make_teachers(
    teachers: Iterable[str | nn.Module | TeacherSpec], student: ModelInfo, num_classes: int | None
) -> nn.ModuleList:
    """Teachers from modules, names of timm models with published weights, `TeacherSpec`, or caches of what
    they said.

    `num_classes` is what they must know; None where nothing but features are read.

    Raises:
        UnknownNameError: timm has no such model.
        ModelError: a teacher knows other classes than the student, or its published weights cannot be had.
    """
    return nn.ModuleList(_made(teacher, student, num_classes) for teacher in teachers)


def _made(given: str | nn.Module | TeacherSpec, student: ModelInfo, num_classes: int | None) -> nn.Module:
    if isinstance(given, CachedTeacher):
        if num_classes is not None:
            _check_classes(given.info.name, given.num_classes, student.name, num_classes)
        return given
    spec = given if isinstance(given, TeacherSpec) else TeacherSpec(given)
    needed = num_classes if spec.classes is None else None
    if spec.classes is not None and num_classes is not None and len(spec.classes) != num_classes:
        raise ModelError(
            f"the class map of a teacher has {len(spec.classes)} classes and student {student.name} "
            f"{num_classes}; it has one for each class of the student, in the student's order"
        )
    module = _teacher_module(spec.model, student, needed)
    return Teacher(replace(spec, model=module), student)


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
            f"teacher {teacher} knows {count} classes and student {student} {num_classes}; create the "
            f"student with num_classes={count}, train a teacher on the student's classes, or say which of "
            "the teacher's they are: TeacherSpec(teacher, classes=[...]), in a recipe classes: map.txt"
        )
