"""The teachers that a recipe names, as `wrap` takes them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import timm
from torch import nn

from vmkd_fx.distill.cache.identity import data_identity, teacher_identity
from vmkd_fx.distill.cache.teacher import CachedTeacher
from vmkd_fx.distill.card import create_model
from vmkd_fx.distill.class_maps import read_class_map
from vmkd_fx.distill.data import ImageData
from vmkd_fx.distill.differences import differences
from vmkd_fx.distill.recipe import ModelConfig, Recipe, TeacherConfig
from vmkd_fx.distill.teacher_spec import TeacherSpec
from vmkd_fx.distill.teachers import Teacher
from vmkd_fx.errors import CacheError, ModelError
from vmkd_fx.graph.info import ModelInfo, model_info
from vmkd_fx.graph.shapes import class_count


def recipe_teachers(recipe: Recipe, data: ImageData) -> list[TeacherSpec | CachedTeacher]:
    """Every teacher of a recipe: a model and how it is run, or the cache of what it said.

    Raises:
        CacheError: a cache is of another teacher, other images or another seed, or holds fewer epochs.
        ModelError, RecipeError, CheckpointError: a teacher cannot be made as the recipe says.
    """
    return [
        teacher_spec(config, data) if config.cache is None else _cached(recipe, place, config, data)
        for place, config in enumerate(recipe.teachers)
    ]


def teacher_spec(config: TeacherConfig, data: ImageData) -> TeacherSpec:
    """The teacher itself, which must know the classes of the data or have a map to them."""
    _refuse_fresh_classifier(config, data)
    own = {} if config.classes is not None else {"num_classes": data.num_classes}
    wanted = ModelConfig(model=config.model, options={**own, **config.options}, checkpoint=config.checkpoint)
    model = create_model(wanted)
    return TeacherSpec(
        model,
        classes=_classes(config, model, data),
        device=config.device,
        dtype=config.dtype,
        image_size=config.image_size,
        compile=config.compile,
    )


def _refuse_fresh_classifier(config: TeacherConfig, data: ImageData) -> None:
    """timm puts a random classifier in the place of a published one that knows other classes."""
    if not config.options.get("pretrained") or config.classes is not None or config.checkpoint is not None:
        return
    published = timm.get_pretrained_cfg(config.model)
    if published is not None and published.num_classes != data.num_classes:
        raise ModelError(
            f"teacher {config.model}: its published weights know {published.num_classes} classes and the "
            f"data set {data.name} has {data.num_classes}; say with `classes` which of them count, "
            "or give a checkpoint that was trained on these images"
        )


def _classes(config: TeacherConfig, model: nn.Module, data: ImageData) -> tuple[int, ...] | None:
    if config.classes is None:
        return None
    info = model_info(model)
    known = info.num_classes or class_count(model, info.input_size or data.input_size)
    return read_class_map(config.classes, known, data.labels, config.model)


def _cached(recipe: Recipe, place: int, config: TeacherConfig, data: ImageData) -> CachedTeacher:
    teacher = CachedTeacher(config.cache or "", place)
    manifest = teacher.folder.manifest
    _refuse("other images", teacher, manifest.images, data_identity(recipe, data))
    if config.model:
        spec = replace(teacher_spec(config, data), device=None, compile=False)
        images = ModelInfo("", input_size=data.input_size, mean=data.mean, std=data.std)
        _refuse("another teacher", teacher, manifest.teacher, teacher_identity(Teacher(spec, images)))
    teacher.folder.check_epochs(recipe.train.epochs)
    return teacher


def _refuse(what: str, teacher: CachedTeacher, found: dict[str, Any], asked: dict[str, Any]) -> None:
    if changes := differences(found, json.loads(json.dumps(asked))):
        raise CacheError(
            f"{teacher.folder.path} is a cache of {what}: {'; '.join(changes)}. Write one for this recipe "
            "with vmkd cache, into a folder of its own"
        )
