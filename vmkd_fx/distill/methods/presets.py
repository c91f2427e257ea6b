"""Methods by name, and recipes that put several together: "vitkd+nkd"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from vmkd_fx.distill.methods.base import Method
from vmkd_fx.distill.methods.ccs import Ccs
from vmkd_fx.distill.methods.cit import CiT
from vmkd_fx.distill.methods.deit import DeiT
from vmkd_fx.distill.methods.features import FitNet, Mgd
from vmkd_fx.distill.methods.logits import Distillation, Dkd, Nkd
from vmkd_fx.distill.methods.riformer import RIFormer
from vmkd_fx.distill.methods.std import Std
from vmkd_fx.distill.methods.vitkd import ViTKD
from vmkd_fx.errors import RecipeError, UnknownNameError

PRESETS: dict[str, Method] = {
    method.name: method
    for method in (
        Std("std"),
        Std("std-intermediate", positions=("2/3", -1)),
        ViTKD("vitkd"),
        RIFormer("riformer"),
        Ccs("ccs"),
        CiT("cit"),
        Distillation("kd", distillation="soft", temperature=3.0),
        Distillation("hard"),
        DeiT("deit"),
        FitNet("fitnet"),
        Mgd("mgd"),
        Dkd("dkd"),
        Nkd("nkd"),
    )
}
"""`std-intermediate`: the first teacher at two thirds of the depth, the second at the end (STD section
4.3).
"""


def resolve(preset: str, overrides: Mapping[str, Any] | None = None) -> Method:
    """A preset with some of its settings changed.

    Raises:
        UnknownNameError: there is no such preset.
        RecipeError: there is no such setting, or its value cannot be.
    """
    if preset not in PRESETS:
        raise UnknownNameError("method", preset, PRESETS)
    known = settings_of(PRESETS[preset])
    for key in overrides or {}:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise RecipeError(f"method {preset!r} has no setting {key!r}{hint} It has: {', '.join(known)}")
    return replace(PRESETS[preset], **(overrides or {}))


def settings_of(method: Method) -> list[str]:
    """The names of a method's settings."""
    return [field.name for field in fields(method) if field.name != "name"]


def resolve_all(methods: Any, overrides: Mapping[str, Any] | None = None) -> tuple[Method, ...]:
    """Several methods that train one student.

    Args:
        methods: a preset's name, several joined by "+", a `Method`, or a list of any of these.
        overrides: changes to settings, each of the one method that has it.

    Raises:
        UnknownNameError: there is no such preset.
        RecipeError: a setting belongs to none of the methods or to several; a method is there twice.
    """
    names = [methods] if isinstance(methods, (str, Method)) else list(methods)
    parts = [part for item in names for part in (item.split("+") if isinstance(item, str) else [item])]
    if not parts:
        raise RecipeError(f"no method was given; there are {', '.join(PRESETS)}")
    if len(parts) == 1 and isinstance(parts[0], str):
        return (resolve(parts[0], overrides),)
    chosen = [part if isinstance(part, Method) else resolve(part.strip()) for part in parts]
    for key, value in (overrides or {}).items():
        owners = [index for index, method in enumerate(chosen) if key in settings_of(method)]
        if len(owners) != 1:
            named = ", ".join(repr(chosen[index].name) for index in owners) or "none of the methods"
            raise RecipeError(
                f"setting {key!r} belongs to {named} of {' + '.join(m.name for m in chosen)}; "
                "give the methods as a list, each with its own settings: "
                "[{preset: ..., setting: ...}, ...] in a recipe, [resolve(name, {...}), ...] in Python"
            )
        chosen[owners[0]] = replace(chosen[owners[0]], **{key: value})
    refuse_twice(chosen)
    return tuple(chosen)


def refuse_twice(methods: Iterable[Method]) -> None:
    """Refuse methods whose outputs would have the same names.

    Raises:
        RecipeError: two of a kind.
    """
    seen: dict[str, str] = {}
    for method in methods:
        edits = type(method).injections is not Method.injections or type(method).changes is not Method.changes
        kind = type(method).__name__ if edits else method.name
        if kind in seen:
            if seen[kind] == method.name:
                raise RecipeError(f"method {method.name!r} is there twice; give it once, with its settings")
            raise RecipeError(f"{seen[kind]!r} and {method.name!r} are of one kind; take one of them")
        seen[kind] = method.name
