"""Optional packages, imported where they are used; a missing one names the extra that installs it."""

from __future__ import annotations

import importlib
from types import ModuleType

from vmkd_fx.errors import MissingExtraError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or say which extra of vmkd-fx brings it.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        raise MissingExtraError(
            f"{purpose} needs the package {error.name!r}, which is not installed: "
            f"pip install 'vmkd-fx[{extra}]'"
        ) from error
