"""The check of many models: side by side, resumable, one line of JSON a model."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator
from pathlib import Path

from vmkd_fx.errors import UnknownNameError
from vmkd_fx.files import make_folder, write_text
from vmkd_fx.progress import progress
from vmkd_fx.zoo.coverage import as_csv, as_markdown
from vmkd_fx.zoo.journal import appending, read, stamp
from vmkd_fx.zoo.row import Row
from vmkd_fx.zoo.side_by_side import side_by_side

ROWS = "rows.jsonl"


def sweep(
    pattern: str = "*",
    out: str | os.PathLike[str] = "sweep-out",
    *,
    full: bool = False,
    jobs: int | None = None,
    restart: bool = False,
) -> list[Row]:
    """Check every timm model whose name fits `pattern`, and write the table.

    Args:
        pattern: names as the shell matches them: "vit_*".
        out: folder for `rows.jsonl`, which grows model by model, and then `coverage.json`, `coverage.csv` and
            `coverage.md`. Models that have a row there, by the same versions of timm, torch and this package,
            are not checked again.
        full: also check on real numbers the smallest model of each family among them.
        jobs: processes; one for each core by default.
        restart: forget the rows of an earlier sweep.

    Raises:
        UnknownNameError: no model fits the pattern.
        OutputError: the folder cannot be written to.
    """
    import timm

    from vmkd_fx.zoo.check import check

    names = [name for name in timm.list_models() if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise UnknownNameError("timm model that fits", pattern, timm.list_models())
    folder = Path(out)
    make_folder(folder)
    written = stamp()
    journal = folder / ROWS
    if restart:
        journal.unlink(missing_ok=True)
    done = read(journal, written, Row.from_json)
    rows = {name: done[name] for name in names if name in done}
    missing = [name for name in names if name not in rows]
    with appending(journal) as append:
        for row in side_by_side(check, _died, missing, len(rows), jobs):
            rows[row.model] = row
            append(row, written)
        for row in _numbered([r for r in _smallest(list(rows.values())) if not r.numbers]) if full else ():
            append(row, written)
    ordered = [rows[name] for name in names]
    write_text(folder / "coverage.json", json.dumps([row.to_json() for row in ordered], indent=1) + "\n")
    write_text(folder / "coverage.csv", as_csv(ordered))
    write_text(folder / "coverage.md", as_markdown(ordered, written))
    return ordered


def _died(name: str) -> Row:
    return Row(name, "", trace="the process that checked it died")


def _numbered(rows: list[Row]) -> Iterator[Row]:
    """The rows with the findings on real numbers."""
    import timm

    from vmkd_fx.zoo.numbers import check_numbers

    for row in progress(rows, "numbers"):
        try:
            row.numbers = check_numbers(timm.create_model(row.model))
        except Exception as error:
            row.numbers = {"numbers": f"{type(error).__name__}: {error}".splitlines()[0]}
        yield row


def _smallest(rows: list[Row]) -> list[Row]:
    """The smallest model of each family."""
    found: dict[str, Row] = {}
    for row in rows:
        best = found.get(row.family)
        if best is None or row.parameters < best.parameters:
            found[row.family] = row
    return list(found.values())
