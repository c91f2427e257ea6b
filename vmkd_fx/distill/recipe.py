"""A training recipe: which student, teachers, method, data and schedule, as one YAML file.

    student: {model: resmlp_12_224, options: {img_size: 32}}
    teachers:
      - {model: resnet10t, checkpoint: runs/teacher/last.safetensors}
    method: {preset: std, alpha: 0.7}
    data: {name: digits, labelled: 200}
    train: {epochs: 30, lr: 1.0e-3, ema_decay: 0.999}
    out: runs/std

A key that is no key, a value of the wrong kind and a name that nobody knows are refused when the recipe is
read, with the line where they stand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from vmkd_fx.distill.recipe_yaml import Keys, Source, dotted, override, read
from vmkd_fx.errors import RecipeError, UnknownNameError, VmkdError
from vmkd_fx.extras import require

# timm's schedules whose whole course follows from the keys below; timm keeps no list of them.
SCHEDULES = ("constant", "cosine", "rsqrt", "tanh", "wsd")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """A timm model: its name, keyword arguments for `timm.create_model`, and weights."""

    model: str = Field(description="timm's name of the model")
    options: dict[str, JsonValue] = Field(default={}, description="keyword arguments for timm.create_model")
    checkpoint: str | None = Field(
        default=None, description="weights: .safetensors, or a timm or torch file; none: as created"
    )


class MethodConfig(BaseModel):
    """A distillation method: a preset, and those of its options that are changed."""

    model_config = ConfigDict(extra="allow", frozen=True)

    preset: str = Field(description="name of the preset", strict=True)

    @property
    def overrides(self) -> dict[str, Any]:
        """The options that differ from the preset's."""
        return dict(self.model_extra or {})


class DataConfig(_Section):
    """The images: a data set's name and how many labelled images of it are used."""

    name: str = Field(default="digits", description="name of the data set")
    labelled: int = Field(default=200, ge=1, description="labelled training images")
    image_size: int = Field(default=32, ge=1, description="height and width in pixels")
    augment: bool = Field(default=True, description="move and brighten training images at random")


class TrainConfig(_Section):
    """The optimiser, its schedule, and how often things are written down."""

    epochs: int = Field(default=30, ge=1, description="passes over the training images")
    batch_size: int = Field(default=64, ge=1, description="images a step; an epoch has whole batches only")
    optimizer: str = Field(default="adamw", description="a name in timm.optim.list_optimizers()")
    lr: float = Field(default=1e-3, gt=0, description="largest learning rate")
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end of the schedule")
    weight_decay: float = Field(
        default=0.05, ge=0, description="for all parameters but the one-dimensional ones"
    )
    schedule: str = Field(default="cosine", description=f"one of {', '.join(SCHEDULES)}; updated every step")
    warmup_epochs: int = Field(
        default=0, ge=0, description="epochs of warm-up from lr / 100, part of `epochs`"
    )
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="largest decay of the averaged weights; none: no average"
    )
    clip_grad: float | None = Field(
        default=None, gt=0, description="largest norm of the gradient; none: not clipped"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="of the class loss")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="of batches, augmentation and everything random in training"
    )
    checkpoint_every: int = Field(default=50, ge=1, description="steps between checkpoints")
    evaluate_every: int = Field(
        default=1, ge=1, description="epochs between evaluations; the last epoch always has one"
    )
    log_every: int = Field(default=1, ge=1, description="steps between lines in the log")

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}; it must be below epochs, {self.epochs}")
        return self


class Recipe(_Section):
    """One training, complete.

    `method` is a preset's name, several joined by "+", a mapping with the preset and changed options, or a
    list of these; absent or "none" it is training without distillation.
    """

    student: ModelConfig
    teachers: tuple[ModelConfig, ...] = Field(default=(), strict=False)
    method: tuple[MethodConfig, ...] = Field(default=(), strict=False)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    out: str = Field(description="folder for the log, checkpoints and weights")

    @field_validator("method", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        items = [] if value in ("none", None) else value if isinstance(value, (list, tuple)) else [value]
        return [part for item in items for part in _methods_in(item)]

    @model_validator(mode="after")
    def _teachers_are_used(self) -> Recipe:
        if self.teachers and not self.method:
            raise ValueError(
                "teachers are given and no method that uses them; add a method or drop the teachers"
            )
        return self

    def digest(self) -> str:
        """SHA-256 of everything but `out`, in hexadecimal: trainings with one digest are one training."""
        content = self.model_dump(mode="json", exclude={"out"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _methods_in(item: Any) -> list[Any]:
    """The methods that a text stands for; anything else is one, right or wrong."""
    return [{"preset": name.strip()} for name in item.split("+")] if isinstance(item, str) else [item]


_SECTIONS: dict[str, type[BaseModel]] = {
    "student": ModelConfig,
    "teachers": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
}


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, replace values by `overrides` ("train.epochs=3"), and check every key, value and name.

    Raises:
        RecipeError: the file is no recipe; a key or a value may not stand where it stands.
        UnknownNameError: there is no such model, optimiser, schedule, data set or method.
    """
    source = read(path)
    if not isinstance(source.data, dict):
        raise RecipeError(
            f"{source.where(())}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}"
        )
    for assignment in overrides:
        source = override(source, assignment)
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(problem, source) for problem in error.errors())) from error
    _check_names(recipe, source)
    return recipe


def _explain(problem: Any, source: Source) -> str:
    keys: Keys = problem["loc"]
    where = f"{source.where(keys)}: {dotted(keys) or 'recipe'}"
    if problem["type"] == "extra_forbidden":
        section = _SECTIONS[str(keys[0])] if len(keys) > 1 else Recipe
        return str(UnknownNameError("key", str(keys[-1]), section.model_fields, where))
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where} is {problem['input']!r}: {message[0].lower() + message[1:]}"


def _check_names(recipe: Recipe, source: Source) -> None:
    timm, optim = (
        require(name, extra="train", purpose="reading a recipe") for name in ("timm", "timm.optim")
    )
    from vmkd_fx.distill.data import DATASETS
    from vmkd_fx.models import register

    register()
    models: list[tuple[Keys, str]] = [(("student", "model"), recipe.student.model)]
    models += [(("teachers", place, "model"), teacher.model) for place, teacher in enumerate(recipe.teachers)]
    for keys, name in models:
        if not timm.is_model(name):
            raise UnknownNameError("model", name, timm.list_models(), f"{source.where(keys)}: {dotted(keys)}")
    choices = [
        (("data", "name"), "data set", recipe.data.name, DATASETS),
        (("train", "optimizer"), "optimizer", recipe.train.optimizer, optim.list_optimizers()),
        (("train", "schedule"), "schedule", recipe.train.schedule, SCHEDULES),
    ]
    for keys, kind, name, known in choices:
        if name not in known:
            raise UnknownNameError(kind, name, known, f"{source.where(keys)}: {dotted(keys)}")
    _check_methods(recipe.method, source.where(("method",)))


def _check_methods(methods: Sequence[MethodConfig], where: str) -> None:
    from vmkd_fx.distill.methods import resolve, resolve_all

    try:
        if methods:
            resolve_all([resolve(method.preset, method.overrides) for method in methods])
    except VmkdError as error:
        error.args = (f"{where}: method: {error}",)
        raise
