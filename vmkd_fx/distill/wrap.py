"""`wrap`: a student, a method and teachers become a training task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from vmkd_fx.distill.applies import NO_CLASSIFIER
from vmkd_fx.distill.cache.teacher import CachedTeacher
from vmkd_fx.distill.methods import Method, Source, resolve_all
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.distill.teacher_spec import TeacherSpec
from vmkd_fx.distill.teachers import Teacher, make_teachers
from vmkd_fx.errors import ModelError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.shapes import class_count
from vmkd_fx.graph.trace import trace
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.injections import inject

Frozen = Sequence[Teacher | CachedTeacher]


def wrap(
    student: Any,
    method: str | Method | Sequence[str | Method],
    teachers: Iterable[str | nn.Module | TeacherSpec] = (),
    *,
    copy: bool = False,
    criterion: nn.Module | None = None,
    input_size: tuple[int, int, int] | None = None,
    epochs: int | None = None,
    **settings: Any,
) -> DistillationTask:
    """Make a training task of a student.

    Args:
        student: a model, a traced module or a task. Its parameters are trained where they are; the rest of it
            is left as it was.
        method: name of a preset, see `vmkd_fx.distill.methods.PRESETS`; several as "vitkd+nkd" or in a list;
            or a `Method`.
        teachers: modules, names of timm models whose published weights are then loaded, `TeacherSpec` for one
            that runs in its own manner, or `CachedTeacher` for what one said before.
        copy: train a copy of the parameters instead.
        criterion: the loss to the labels; cross-entropy by default.
        input_size: (C, H, W) of one image, where the student does not say.
        epochs: how long the training will be, for methods with a schedule; `task.set_epoch` then says which
            one runs.
        **settings: changes to the preset, see its `Method`.

    Returns:
        A `timm.task.TrainingTask`: `task(images, targets)` gives "loss", "output" and every named loss term.

    Raises:
        UnknownNameError: no such method or teacher.
        RecipeError: a setting does not exist, or there is no teacher, or a schedule is longer than `epochs`.
        MatchError: the student has nothing that the method could be attached to.
        ModelError: student and teacher know different classes, or the student has no classifier.
    """
    methods = resolve_all(method, settings)
    teachers = [teachers] if isinstance(teachers, (str, nn.Module, TeacherSpec)) else list(teachers)
    for chosen in methods:
        chosen.check_run(len(teachers), epochs)
    module = trace(student, copy=copy, input_size=input_size)
    if module.info.num_classes == 0:
        raise ModelError(NO_CLASSIFIER.format(module.info.name))
    classes: int | None = class_count(module, module.info.need_input_size())
    if not any(chosen.reads_logits for chosen in methods):
        classes = None
    frozen: list[Teacher | CachedTeacher] = list(make_teachers(teachers, module.info, classes))  # type: ignore[arg-type]
    module = _injected(module, methods, frozen)
    for chosen in methods:
        chosen.start(module, [teacher.model for teacher in frozen])
    return DistillationTask(module, frozen, methods, criterion, epochs)


def _injected(module: TracedModule, methods: Sequence[Method], teachers: Frozen) -> TracedModule:
    """The student with everything that the methods put in: first what becomes part of it."""
    known = anatomy(module)
    for method in methods:
        if changes := method.changes(known):
            module = inject(module, changes, known)
            known = anatomy(module)
    student = Source(module.info.name, module.info.need_input_size(), known)
    sources = _tapped(student, methods, teachers)
    edits = [edit for method in methods for edit in method.injections(student, sources)]
    return inject(module, edits, known)


def _tapped(student: Source, methods: Sequence[Method], teachers: Frozen) -> list[Source]:
    """Tap every feature that some method reads, and return what the methods know of the teachers."""
    readers = {i for method in methods if (i := method.feature_teacher) is not None}
    sources = [teacher.source(index in readers) for index, teacher in enumerate(teachers)]
    for index in readers:
        reading = [method for method in methods if method.feature_teacher == index]
        teachers[index].read(
            {name: one for method in reading for name, one in method.wanted(student, sources[index]).items()}
        )
    return sources
