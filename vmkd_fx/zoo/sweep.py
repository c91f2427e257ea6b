"""The check of many models: side by side, resumable, one line of JSON a model."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from vmkd_fx.errors import OutputError, UnknownNameError
from vmkd_fx.files import make_folder, write_text
from vmkd_fx.progress import progress
from vmkd_fx.zoo.coverage import as_csv, as_markdown
from vmkd_fx.zoo.row import Row

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

    names = [name for name in timm.list_models() if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise UnknownNameError("timm model that fits", pattern, timm.list_models())
    folder = Path(out)
    make_folder(folder)
    stamp = _stamp()
    journal = folder / ROWS
    if restart:
        journal.unlink(missing_ok=True)
    done = _read(journal, stamp)
    rows = {name: done[name] for name in names if name in done}
    with _appending(journal) as append:
        for row in _checked([name for name in names if name not in rows], len(rows), jobs):
            rows[row.model] = row
            append(row, stamp)
        for row in _numbered([r for r in _smallest(list(rows.values())) if not r.numbers]) if full else ():
            append(row, stamp)
    ordered = [rows[name] for name in names]
    write_text(folder / "coverage.json", json.dumps([row.to_json() for row in ordered], indent=1) + "\n")
    write_text(folder / "coverage.csv", as_csv(ordered))
    write_text(folder / "coverage.md", as_markdown(ordered, stamp))
    return ordered


def _checked(names: list[str], before: int, jobs: int | None) -> Iterator[Row]:
    """Rows of `names` as they get ready.

    Where a process dies, a model too large for the machine say, the models that were under way are checked
    one by one, so that only the one that kills its process goes without an answer.
    """
    from vmkd_fx.zoo.check import check

    jobs = jobs or os.cpu_count() or 1
    waiting = dict.fromkeys(names)
    with progress(before + len(names), "sweep", initial=before) as bar:
        together = jobs
        while waiting:
            batch = list(waiting) if together > 1 or jobs == 1 else list(waiting)[:jobs]
            try:
                for row in _in_processes(check, batch, together):
                    del waiting[row.model]
                    bar.note(row.model)
                    bar.update()
                    yield row
                together = jobs
            except BrokenProcessPool:
                if together > 1:
                    together = 1
                    continue
                name = next(iter(waiting))
                del waiting[name]
                bar.update()
                yield Row(name, "", trace="the process that checked it died")


def _in_processes(check: Callable[[str], Row], names: list[str], jobs: int) -> Iterator[Row]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_quietly) as pool:
        todo = iter(names)
        under_way: set[Future[Row]] = set()
        while True:
            for name in islice(todo, 2 * jobs - len(under_way)):
                under_way.add(pool.submit(check, name))
            if not under_way:
                return
            ready, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in ready:
                yield future.result()


def _quietly() -> None:
    """One thread a process, and no warnings about models with new names."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


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


def _stamp() -> str:
    """What a row depends on: the versions of timm and torch, and this package's own code."""
    import timm
    import torch

    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"timm {timm.__version__}, torch {torch.__version__}, vmkd-fx {digest.hexdigest()[:12]}"


def _read(journal: Path, stamp: str) -> dict[str, Row]:
    """Rows of an earlier sweep by the same code; a line that was cut off is left out."""
    rows = {}
    if journal.is_file():
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                data = json.loads(line)
                if data.pop("stamp") == stamp:
                    rows[data["model"]] = Row.from_json(data)
            except (ValueError, KeyError, TypeError):
                continue
    return rows


@contextmanager
def _appending(journal: Path) -> Iterator[Callable[[Row, str], None]]:
    """A function that adds a row to the journal, at once."""
    try:
        with journal.open("a", encoding="utf-8") as file:

            def append(row: Row, stamp: str) -> None:
                file.write(json.dumps({"stamp": stamp, **row.to_json()}) + "\n")
                file.flush()

            yield append
    except OSError as error:
        raise OutputError(f"cannot write {journal}: {error.strerror or error}") from error
