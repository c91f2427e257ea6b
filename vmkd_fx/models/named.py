"""A model by its name: timm's, or "package.module:factory" for one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from torch import nn

from vmkd_fx.errors import ModelError, RecipeError, UnknownNameError
from vmkd_fx.models.registry import register
from vmkd_fx.user_code import current_directory_importable, from_user_code


def named_model(name: str, options: dict[str, Any]) -> nn.Module:
    """Make the model that `name` means.

    Args:
        name: of a timm model, or "package.module:factory", a function of the user's own code: the module is
            imported, also from the current directory, and the function is called with the options.
        options: keyword arguments for `timm.create_model` or for the factory.

    Raises:
        UnknownNameError: timm has no such model, or the module no such factory.
        RecipeError: the model takes no such options; the module cannot be imported, or its factory fails.
        ModelError: the factory returned something else than a module.
    """
    if ":" in name:
        with current_directory_importable():
            return _from_factory(name, options)
    register()
    if not timm.is_model(name):
        raise UnknownNameError("timm model", name, timm.list_models())
    try:
        return timm.create_model(name, **options)
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        raise RecipeError(f"timm cannot create {name!r} with options {options}: {error}") from error


def _from_factory(name: str, options: dict[str, Any]) -> nn.Module:
    factory = _factory(name)
    try:
        model = factory(**options)
    except Exception as error:
        raise RecipeError(f"{name} failed with options {options}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}; a factory returns a torch.nn.Module")
    return model


def _factory(name: str) -> Callable[..., Any]:
    path, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*path.split("."), attribute)):
        raise RecipeError(
            f"{name!r} is no name of a model: give the name of a timm model, or package.module:factory"
        )
    factory = from_user_code(name, "factory")
    if not callable(factory):
        raise RecipeError(
            f"{name} is of type {type(factory).__name__} and cannot be called; name a function that returns "
            "the model"
        )
    return factory
