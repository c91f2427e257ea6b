"""`wrap`: a student, a method and teachers become a training task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from vmkd_fx.distill.applies import NO_CLASSIFIER
from vmkd_fx.distill.methods import Method, resolve
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.distill.teachers import make_teachers
from vmkd_fx.errors import ModelError, RecipeError
from vmkd_fx.graph.shapes import class_count
from vmkd_fx.graph.trace import trace
from vmkd_fx.passes.std_tokens import inject_std_tokens


def wrap(
    student: Any,
    method: str | Method,
    teachers: Iterable[str | nn.Module] = (),
    *,
    copy: bool = False,
    criterion: nn.Module | None = None,
    input_size: tuple[int, int, int] | None = None,
    **settings: Any,
) -> DistillationTask:
    """Make a training task of a student.

    Args:
        student: a model, a traced module or a task. Its parameters are trained where they are; the rest of it
            is left as it was.
        method: name of a preset ("std", "std-intermediate", "hard", "kd") or a `Method`.
        teachers: modules, or names of timm models whose published weights are then loaded.
        copy: train a copy of the parameters instead.
        criterion: the loss to the labels; cross-entropy by default.
        input_size: (C, H, W) of one image, where the student does not say.
        **settings: changes to the preset, see `Method`.

    Returns:
        A `timm.task.TrainingTask`: `task(images, targets)` gives "loss", "output" and every named loss term.

    Raises:
        UnknownNameError: no such method or teacher.
        RecipeError: a setting does not exist, or there is no teacher.
        MatchError: the student has nothing that the method could be attached to.
        ModelError: student and teacher know different classes, or the student has no classifier.
    """
    chosen = method if isinstance(method, Method) else resolve(method, settings)
    if isinstance(method, Method) and settings:
        raise RecipeError(
            f"settings {', '.join(settings)} change a preset given by name; here a Method was given"
        )
    teachers = [teachers] if isinstance(teachers, (str, nn.Module)) else list(teachers)
    if not teachers:
        raise RecipeError(
            f"method {chosen.name!r} needs a teacher: wrap(student, {chosen.name!r}, teachers=[...])"
        )
    module = trace(student, copy=copy, input_size=input_size)
    if module.info.num_classes == 0:
        raise ModelError(NO_CLASSIFIER.format(module.info.name))
    classes = class_count(module, module.info.need_input_size())
    frozen = make_teachers(teachers, module.info, classes)
    if chosen.tokens:
        module = inject_std_tokens(module, chosen.std_config(len(teachers)))
    return DistillationTask(module, frozen, chosen, criterion)  # type: ignore[arg-type]
