"""A YAML file as plain data that remembers where each key stands.

Only mappings with text keys, lists and scalars; no tags, no anchors, each key once. `1e-3` is a number.
"""

from __future__ import annotations

import os
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vmkd_fx.errors import RecipeError

Keys = tuple[str | int, ...]

MAX_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader, with YAML 1.2's reading of floats."""


# YAML 1.1 wants a dot and a signed exponent: `1e-3` would be a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Source:
    """Plain data and the place of every key in it.

    Attributes:
        data: mappings, lists and scalars.
        places: "file:line" or "override KEY=VALUE" for the keys that lead to a value.
    """

    data: Any
    places: dict[Keys, str]

    def where(self, keys: Keys) -> str:
        """The place of the value under `keys`, or of the nearest thing around it that was written down."""
        while keys not in self.places and keys:
            keys = keys[:-1]
        return self.places[keys]


def read(path: str | os.PathLike[str]) -> Source:
    """Read a YAML file.

    Raises:
        RecipeError: the file cannot be read, is larger than `MAX_BYTES`, or holds what a recipe may not hold.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        hint = "; the recipe's file stands before what changes it" if "=" in str(path) else ""
        raise RecipeError(f"cannot read {path}: {error.strerror or error}{hint}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than {MAX_BYTES} bytes: this is no recipe")
    try:
        return _parse(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def override(source: Source, assignment: str) -> Source:
    """`source` with one value replaced, as in `train.epochs=3` or `teachers.0.checkpoint=a.safetensors`.

    Raises:
        RecipeError: `assignment` has another form, or its key leads through what is no mapping and no list.
    """
    place = f"override {assignment}"
    dotted, equals, text = assignment.partition("=")
    if not equals or not all(dotted.split(".")):
        raise RecipeError(f"{place}: write it as key=value, for example train.epochs=3")
    value = _parse(text, place).data
    data, keys = deepcopy(source.data), [int(key) if key.isdigit() else key for key in dotted.split(".")]
    holder = data
    for depth, key in enumerate(keys):
        _check_step(holder, key, keys[:depth], place)
        if depth == len(keys) - 1:
            holder[key] = value
        else:
            holder = holder.setdefault(key, {}) if isinstance(holder, dict) else holder[key]
    changed = tuple(keys)
    kept = {keys: where for keys, where in source.places.items() if keys[: len(changed)] != changed}
    return Source(data, {**kept, changed: place})


def dotted(keys: Keys) -> str:
    """`("teachers", 0, "model")` as `teachers.0.model`."""
    return ".".join(map(str, keys))


def _check_step(holder: Any, key: str | int, parents: list[str | int], place: str) -> None:
    if isinstance(holder, dict) and isinstance(key, str):
        return
    if isinstance(holder, list) and isinstance(key, int) and key < len(holder):
        return
    parent = dotted(tuple(parents)) or "the recipe"
    kind = f"a list of {len(holder)}" if isinstance(holder, list) else type(holder).__name__
    raise RecipeError(f"{place}: {parent} is {kind} and has no {key!r}; give {parent} as a whole")


def _parse(text: str, name: str) -> Source:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Source(None, {(): f"{name}:1"})
        places: dict[Keys, str] = {(): f"{name}:{node.start_mark.line + 1}"}
        _locate(node, (), name, places, set())
        return Source(loader.construct_document(node), places)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{name}{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{name}: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{name}: nested too deeply for a recipe") from error


def _locate(node: yaml.Node, keys: Keys, name: str, places: dict[Keys, str], seen: set[int]) -> None:
    """Fill `places`; an anchor is refused here, before what it stands for is copied out."""
    where = f"{name}:{node.start_mark.line + 1}"
    if id(node) in seen:
        raise RecipeError(f"{where}: a recipe has no anchors (&name, *name); write the value out")
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            inner = (*keys, index)
            places[inner] = f"{name}:{item.start_mark.line + 1}"
            _locate(item, inner, name, places, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = f"{name}:{key.start_mark.line + 1}"
            if key.tag != "tag:yaml.org,2002:str":
                raise RecipeError(
                    f"{place}: a key of {dotted(keys) or 'the recipe'} is no text; put it in quotes"
                )
            inner = (*keys, key.value)
            if inner in places:
                raise RecipeError(
                    f"{place}: {dotted(inner)} stands here again; it was set at {places[inner]}"
                )
            places[inner] = place
            _locate(value, inner, name, places, seen)
