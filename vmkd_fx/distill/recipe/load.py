"""Reading a recipe: every key and every value checked, with the line where it stands."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from vmkd_fx.distill.recipe.data import as_data
from vmkd_fx.distill.recipe.names import check_names
from vmkd_fx.distill.recipe.whole import Recipe
from vmkd_fx.distill.recipe_yaml import Keys, Source, dotted, override, read
from vmkd_fx.errors import RecipeError, UnknownNameError


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
    source = _spelled_out(source)
    for assignment in overrides:
        source = _spelled_out(override(source, _in_full(assignment, source)))
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(problem, source) for problem in error.errors())) from error
    check_names(recipe, source)
    return recipe


def _spelled_out(source: Source) -> Source:
    """`data: FOLDER` as the mapping that it stands for, of which an override may change a part."""
    if "data" not in source.data:
        return source
    return Source({**source.data, "data": as_data(source.data["data"])}, source.places)


def _in_full(assignment: str, source: Source) -> str:
    """`data=FOLDER` changes the folder of the data that a recipe describes, and nothing else of it."""
    key, _, value = assignment.partition("=")
    described = isinstance(source.data.get("data"), dict)
    return f"data.root={value}" if key == "data" and described and value[:1] not in ("{", "") else assignment


def _explain(problem: Any, source: Source) -> str:
    keys: Keys = problem["loc"]
    where = f"{source.where(keys)}: {dotted(keys) or 'recipe'}"
    if problem["type"] == "extra_forbidden":
        return str(UnknownNameError("key", str(keys[-1]), _section(keys).model_fields, where))
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where} is {problem['input']!r}: {message[0].lower() + message[1:]}"


def _section(keys: Keys) -> type[BaseModel]:
    """The section that the last of `keys` stands in."""
    section: type[BaseModel] = Recipe
    for key in keys[:-1]:
        if isinstance(key, str):
            section = _sections_in(section.model_fields[key].annotation)[0]
    return section


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The classes of sections that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]
