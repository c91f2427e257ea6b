"""The JSON schema of recipe files, by which editors complete keys, say what they mean and mark wrong ones."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from vmkd_fx.distill.recipe.training import SCHEDULES
from vmkd_fx.distill.recipe.whole import Recipe

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_SECTIONS = {
    "student": "The model that is trained.",
    "teachers": "What it learns from; none: from labels alone.",
    "data": "The images, or their folder.",
    "train": "The optimiser, its schedule, how a step is computed, and how often things are written down.",
}


def recipe_schema() -> dict[str, Any]:
    """The schema as plain data: keys, kinds and bounds of all sections, every method with its settings."""
    schema = Recipe.model_json_schema()
    keys, known = schema["properties"], schema["$defs"]
    known.pop("MethodConfig")
    methods, known["Method"] = _methods()
    known |= methods
    for name, meaning in _SECTIONS.items():
        keys[name]["description"] = meaning
    keys["method"] = {
        "description": "Methods of distillation: one, several joined by +, or a list; none: labels alone.",
        "anyOf": [
            {"type": "null"},
            {"type": "string", "examples": ["none", *_presets(), "vitkd+nkd"]},
            {"$ref": "#/$defs/Method"},
            {"type": "array", "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Method"}]}},
        ],
    }
    keys["data"] = {**keys["data"], "anyOf": [{"$ref": keys["data"].pop("$ref")}, {"type": "string"}]}
    known["TrainConfig"]["properties"]["schedule"]["enum"] = list(SCHEDULES)
    return {
        "$schema": _DRAFT,
        **_without_titles(schema),
        "title": "Recipe of vmkd-fx",
        "description": "One training: a student, its teachers, the method, the images and the schedule.",
    }


def schema_text() -> str:
    """The schema as the file that editors read."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _presets() -> dict[str, Any]:
    from vmkd_fx.distill.methods import PRESETS

    return PRESETS


def _methods() -> tuple[dict[str, Any], dict[str, Any]]:
    """The schemas of all presets by name, and that of any of them."""
    found = {f"method {name}": _method(name, method) for name, method in _presets().items()}
    choices = [{"$ref": f"#/$defs/{name.replace(' ', '%20')}"} for name in found]
    return found, {"type": "object", "required": ["preset"], "oneOf": choices}


def _method(name: str, method: Any) -> dict[str, Any]:
    from vmkd_fx.distill.listing import meanings
    from vmkd_fx.distill.methods import settings_of

    kinds, said = get_type_hints(type(method)), meanings(type(method))
    settings: dict[str, Any] = {
        "preset": {"const": name, "description": f"{method.paper}; for {method.fits}"}
    }
    for setting in settings_of(method):
        value = getattr(method, setting)
        settings[setting] = {
            **TypeAdapter(kinds[setting]).json_schema(),
            "default": list(value) if isinstance(value, tuple) else value,
            "description": said.get(setting, ""),
        }
    return {
        "type": "object",
        "properties": settings,
        "required": ["preset"],
        "additionalProperties": False,
    }


def _without_titles(value: Any) -> Any:
    """pydantic titles everything by its own name, which no editor needs twice."""
    if isinstance(value, list):
        return [_without_titles(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_titles(item)
        for key, item in value.items()
        if not (key == "title" and isinstance(item, str))
    }
