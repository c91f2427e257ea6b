"""What users name as "package.module:name" in code of their own, imported also from the current directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import Any

from vmkd_fx.errors import RecipeError, UnknownNameError


def from_user_code(name: str, kind: str) -> Any:
    """What "package.module:name" stands for.

    Args:
        name: of a module and of something in it.
        kind: what it should be, for the messages.

    Raises:
        RecipeError: it is no such name, or the module cannot be imported.
        UnknownNameError: the module holds nothing of this name.
    """
    path, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*path.split("."), attribute)):
        raise RecipeError(f"{name!r} is no name of a {kind}: write package.module:name")
    with current_directory_importable():
        module = _imported(path, name)
    if not hasattr(module, attribute):
        known = [key for key in vars(module) if not key.startswith("_")]
        raise UnknownNameError(kind, attribute, known, where=path)
    return getattr(module, attribute)


@contextmanager
def current_directory_importable() -> Iterator[None]:
    """Put the current directory first in the search path, as `python -m` does and a console script does
    not.
    """
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:  # the user's code may have changed the list
            sys.path.remove(here)


def _imported(path: str, name: str) -> Any:
    invalidate_caches()
    try:
        return import_module(path)
    except Exception as error:
        # What the module itself imports in vain is an error in the module, not in its name.
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{path}.".startswith(f"{missing}."):
            raise RecipeError(
                f"{name}: there is no module {missing!r} in {Path.cwd()} or among the installed packages; "
                "call from the folder that holds it, or install it"
            ) from error
        raise RecipeError(f"{name}: importing {path} failed: {type(error).__name__}: {error}") from error
