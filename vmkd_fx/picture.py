"""Pictures by matplotlib: refused early where they cannot be drawn, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vmkd_fx.errors import OutputError
from vmkd_fx.extras import require
from vmkd_fx.files import writing

_KINDS = (".png", ".svg", ".pdf")
_DOTS_PER_INCH = 150


def check_picture(path: str | os.PathLike[str]) -> None:
    """Refuse what cannot be drawn, before anything is measured or read for it.

    Raises:
        OutputError: another kind of file.
        MissingExtraError: the extra `plot` is not installed.
    """
    if Path(path).suffix.lower() not in _KINDS:
        raise OutputError(f"cannot draw {path}: name a file that ends in {', '.join(_KINDS)}")
    require("matplotlib", "plot", "drawing a picture")


def write_picture(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure of matplotlib's in the kind that the end of `path` names.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=_DOTS_PER_INCH)
