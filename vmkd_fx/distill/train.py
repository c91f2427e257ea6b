"""`train`: a recipe from its models to its last checkpoint."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from vmkd_fx.distill.card import KEY, create_model, make_card
from vmkd_fx.distill.data import ImageData, Images, open_data
from vmkd_fx.distill.methods import resolve
from vmkd_fx.distill.recipe import ModelConfig, Recipe
from vmkd_fx.distill.recipe_teachers import recipe_teachers
from vmkd_fx.distill.run_folder import DONE, TrainResult
from vmkd_fx.distill.trainer import fit
from vmkd_fx.distill.training.memory import estimate
from vmkd_fx.distill.training.world import World, joined_world
from vmkd_fx.distill.wrap import wrap
from vmkd_fx.errors import ModelError
from vmkd_fx.graph.info import model_info
from vmkd_fx.graph.shapes import class_count
from vmkd_fx.graph.trace import trace
from vmkd_fx.passes.injections import edits_of

_logger = logging.getLogger(__name__)


def train(recipe: Recipe, *, resume: bool = True, progress: bool = True) -> TrainResult:
    """Train what the recipe describes, or go on where its folder says that it stands.

    Under torchrun every process calls this, and they train together.

    Raises:
        VmkdError: models, teachers, data and method do not fit together, which is said before the first step.
        TrainingStoppedError: a signal asked for it; the state is saved.
    """
    with joined_world(recipe.train.device) as world:
        return _train(recipe, world, resume, progress)


def _train(recipe: Recipe, world: World, resume: bool, progress: bool) -> TrainResult:
    data = open_data(**recipe.data.model_dump())
    torch.manual_seed(recipe.train.seed)
    task = make_task(recipe, data)
    edits = edits_of(trace(task)) if recipe.method else ()
    _say_if_too_large(task.to(world.device), data, recipe, world)
    return fit(
        task,
        data,
        recipe.train,
        recipe.out,
        digest=recipe.digest(),
        settings=recipe.decisive(),
        name=recipe.student.model,
        about={KEY: make_card(recipe, data, edits).to_json()},
        resume=resume,
        progress=progress,
        world=world,
    )


def _say_if_too_large(task: TrainingTask, data: ImageData, recipe: Recipe, world: World) -> None:
    """A word before the first step: the system may end a process that takes too much without one."""
    if (Path(recipe.out) / DONE).exists():
        return
    problem = estimate(task, data, recipe.train, world).problem(recipe.train)
    if problem is not None and world.first:
        print(problem, file=sys.stderr, flush=True)


def make_task(recipe: Recipe, data: ImageData) -> TrainingTask:
    """The training task of a recipe: timm's own without a method, ours with one.

    Raises:
        ModelError: student or teachers know other classes than the data, or take images of another size.
    """
    student = _create(recipe.student, data)
    _say_if_normalised_otherwise(recipe.student, student, data)
    student = make_card(recipe, data).dress(student)
    _check_classes(recipe.student.model, student, data)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.train.label_smoothing)
    if not recipe.method:
        return ClassificationTask(student, criterion=criterion, verbose=False)
    # What learns beside the student begins the same whichever teachers are made, and with a cache of them.
    with torch.random.fork_rng(devices=()):
        teachers = recipe_teachers(recipe, data)
    methods = [resolve(method.preset, method.overrides) for method in recipe.method]
    return wrap(student, methods, teachers, criterion=criterion, epochs=recipe.train.epochs)


def _create(config: ModelConfig, data: ImageData) -> nn.Module:
    options = {"num_classes": data.num_classes, **config.options}
    return create_model(config.model_copy(update={"options": options}))


def _say_if_normalised_otherwise(config: ModelConfig, student: nn.Module, data: ImageData) -> None:
    """A word where a student begins with weights that learned from images of another mean and deviation."""
    own = model_info(student)
    begins_trained = config.checkpoint is not None or config.options.get("pretrained")
    if begins_trained and isinstance(data, Images) and (own.mean, own.std) != (data.mean, data.std):
        mean, std, other_mean, other_std = (
            ",".join(f"{value:g}" for value in values) for values in (own.mean, own.std, data.mean, data.std)
        )
        _logger.warning(
            f"student {config.model} begins with weights that know images of mean {mean} and std {std}, and "
            f"the data gives mean {other_mean} and std {other_std}: data.mean=[{mean}] data.std=[{std}] "
            "gives what they know"
        )


def _check_classes(name: str, student: nn.Module, data: ImageData) -> None:
    try:
        count = class_count(student, data.input_size)
    except ModelError as error:
        own = model_info(student).input_size
        if own is None or own == data.input_size:
            raise
        raise ModelError(
            f"student {name} was made for images of {own[1]} x {own[2]}: data.image_size={own[1]} gives it "
            f"such images, and for many models student.options.img_size={data.input_size[1]} makes another "
            f"of it ({error})"
        ) from error
    if count != data.num_classes:
        raise ModelError(
            f"student {name} knows {count} classes and the data set {data.name} has {data.num_classes}; "
            f"leave num_classes out of its options, or set it to {data.num_classes}"
        )
