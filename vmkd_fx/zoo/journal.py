"""Rows that survive a stop: one line of JSON a row, written at once, read back by the code that wrote it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vmkd_fx.errors import OutputError


class Named(Protocol):
    """A row about one model."""

    model: str

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""


R = TypeVar("R", bound=Named)


def stamp() -> str:
    """What a row depends on: the versions of timm and torch, and this package's own code."""
    import timm
    import torch

    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"timm {timm.__version__}, torch {torch.__version__}, vmkd-fx {digest.hexdigest()[:12]}"


def read(journal: Path, stamp: str, row: Callable[[dict[str, Any]], R]) -> dict[str, R]:
    """Rows of an earlier sweep by the same code, by model; a line that was cut off is left out."""
    rows = {}
    if journal.is_file():
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                data = json.loads(line)
                if data.pop("stamp") == stamp:
                    rows[data["model"]] = row(data)
            except (ValueError, KeyError, TypeError):
                continue
    return rows


@contextmanager
def appending(journal: Path) -> Iterator[Callable[[Named, str], None]]:
    """A function that adds a row to the journal, at once."""
    try:
        with journal.open("a", encoding="utf-8") as file:

            def append(row: Named, stamp: str) -> None:
                file.write(json.dumps({"stamp": stamp, **row.to_json()}) + "\n")
                file.flush()

            yield append
    except OSError as error:
        raise OutputError(f"cannot write {journal}: {error.strerror or error}") from error
