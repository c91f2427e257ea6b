"""Checks of single settings, each with an error that says what would work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vmkd_fx.errors import RecipeError, UnknownNameError


def choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse what is none of the known names."""
    known = tuple(known)
    if value not in known:
        raise UnknownNameError(name, str(value), known)


def positive(method: Any, *names: str) -> None:
    """Refuse settings that are no numbers above 0."""
    for name in names:
        value = getattr(method, name)
        if not is_number(value) or value <= 0:
            raise RecipeError(f"{method.name}: {name} must be above 0, got {value!r}")


def not_negative(method: Any, *names: str) -> None:
    """Refuse settings that are no numbers, or below 0."""
    for name in names:
        value = getattr(method, name)
        if not is_number(value) or value < 0:
            raise RecipeError(f"{method.name}: {name} must be 0 or above, got {value!r}")


def share(method: Any, *names: str) -> None:
    """Refuse settings that are no numbers from 0 to 1."""
    for name in names:
        value = getattr(method, name)
        if not is_number(value) or not 0 <= value <= 1:
            raise RecipeError(f"{method.name}: {name} is a share, from 0 to 1, got {value!r}")


def whole(method: Any, *names: str) -> None:
    """Refuse settings that are no whole numbers from 0."""
    for name in names:
        value = getattr(method, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise RecipeError(f"{method.name}: {name} is a whole number from 0, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether a setting is a real number; YAML's true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
