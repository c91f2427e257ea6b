"""The presets as tables: paper, students that fit, settings and their defaults."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import fields
from typing import Any

from vmkd_fx.distill.methods import PRESETS, Method, resolve, settings_of
from vmkd_fx.table import table


def listing() -> str:
    """All presets, a row each."""
    rows = [
        (name, method.paper, method.fits, ", ".join(defaults(method))) for name, method in PRESETS.items()
    ]
    return "\n".join(
        (
            table(("preset", "paper", "students", "defaults"), rows),
            "",
            "several train one student: 'vitkd+nkd', or a list in a recipe; "
            "'vmkd recipes PRESET' explains one",
        )
    )


def explained(names: str) -> str:
    """One preset, or several joined by "+": what the loss is, and each setting with its default and meaning.

    Raises:
        UnknownNameError: there is no such preset.
    """
    return "\n\n".join(_explained(resolve(name.strip())) for name in names.split("+"))


def _explained(method: Method) -> str:
    said = meanings(type(method))
    settings = [
        textwrap.fill(
            f"{setting} ({_shown(getattr(method, setting))}): {said.get(setting, '')}",
            width=100,
            initial_indent="  ",
            subsequent_indent="      ",
        )
        for setting in settings_of(method)
    ]
    summary = (inspect.getdoc(type(method)) or "").partition("\n\nAttributes:")[0]
    head = f"{method.name} ({method.paper}), for {method.fits}"
    return "\n".join((head, "", summary, "", "settings, with their defaults:", *settings))


def defaults(method: Method) -> list[str]:
    """The settings that say most: numbers, and what differs from the method's other presets."""
    shown = []
    for field in fields(method):
        value = getattr(method, field.name)
        number = isinstance(value, float)
        if field.name != "name" and (number or value != field.default):
            shown.append(f"{field.name}={_shown(value)}")
    return shown


def meanings(kind: type[Any]) -> dict[str, str]:
    """What the docstrings of a class and of those it is made of say about each attribute."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        # Python 3.13 takes the indentation away that all lines share, earlier ones leave it there.
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:")[2]
        entries = re.split(r"\n {4}(?=\w)", text)
        for entry in entries:
            names, colon, meaning = entry.partition(": ")
            if colon:
                meaning = " ".join(meaning.split())
                found.update({name.strip(): meaning for name in names.split(",")})
    return found


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return "none" if value is None else str(value)
