"""The names in a recipe, held against what timm and this package know."""

from __future__ import annotations

from collections.abc import Sequence

from vmkd_fx.distill.recipe.method import MethodConfig
from vmkd_fx.distill.recipe.training import SCHEDULES
from vmkd_fx.distill.recipe.whole import Recipe
from vmkd_fx.distill.recipe_yaml import Keys, Source, dotted
from vmkd_fx.errors import UnknownNameError, VmkdError
from vmkd_fx.extras import require


def check_names(recipe: Recipe, source: Source) -> None:
    """Refuse names that nobody knows: models, data set, optimiser, schedule, method and its settings.

    Raises:
        UnknownNameError: says where it stands and what is near.
        RecipeError: a method has no such setting, or its value cannot be.
    """
    timm, optim = (
        require(name, extra="train", purpose="reading a recipe") for name in ("timm", "timm.optim")
    )
    from vmkd_fx.distill.data import data_names
    from vmkd_fx.models import register

    register()
    models: list[tuple[Keys, str]] = [(("student", "model"), recipe.student.model)]
    models += [
        (("teachers", place, "model"), teacher.model)
        for place, teacher in enumerate(recipe.teachers)
        if teacher.model or teacher.cache is None
    ]
    for keys, name in models:
        if not timm.is_model(name):
            raise UnknownNameError("model", name, timm.list_models(), f"{source.where(keys)}: {dotted(keys)}")
    choices = [
        (("data", "name"), "data set", recipe.data.name, data_names(recipe.data.name)),
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
