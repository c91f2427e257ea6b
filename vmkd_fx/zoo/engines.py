"""The way to an engine for one small member of each of timm's families: resumable, one line of JSON each."""

from __future__ import annotations

import fnmatch
import json
import os
from pathlib import Path

from vmkd_fx.errors import UnknownNameError
from vmkd_fx.extras import require
from vmkd_fx.files import make_folder, write_text
from vmkd_fx.zoo.deployment import Deployment, check_deployment
from vmkd_fx.zoo.deployment_table import as_markdown
from vmkd_fx.zoo.journal import appending, read, stamp
from vmkd_fx.zoo.members import MEMBERS
from vmkd_fx.zoo.side_by_side import side_by_side

ROWS = "engines.jsonl"


def sweep_engines(
    pattern: str = "*",
    out: str | os.PathLike[str] = "sweep-out",
    *,
    jobs: int | None = None,
    restart: bool = False,
) -> list[Deployment]:
    """Lower, export, run, parse and build the members of the zoo whose model's name fits `pattern`.

    Args:
        pattern: names as the shell matches them: "vit_*".
        out: folder for `engines.jsonl`, which grows member by member, and then `engines.json` and
            `engines.md`. Members that have a row there, by the same versions of timm, torch and this
            package, are not tried again.
        jobs: processes; one for each core by default.
        restart: forget the rows of an earlier sweep.

    Raises:
        UnknownNameError: no member fits the pattern.
        MissingExtraError: TensorRT-RTX is not installed.
        OutputError: the folder cannot be written to.
    """
    require("tensorrt_rtx", "rtx", "a sweep down to engines")
    members = [member for member in MEMBERS if fnmatch.fnmatchcase(member.name, pattern)]
    if not members:
        raise UnknownNameError("member of the zoo that fits", pattern, [member.name for member in MEMBERS])
    names = [member.name for member in sorted(members, key=lambda member: bool(member.slow))]
    folder = Path(out)
    make_folder(folder)
    journal = folder / ROWS
    if restart:
        journal.unlink(missing_ok=True)
    written = stamp()
    done = read(journal, written, Deployment.from_json)
    rows = {name: done[name] for name in names if name in done}
    with appending(journal) as append:
        missing = [name for name in names if name not in rows]
        for row in side_by_side(check_deployment, _died, missing, len(rows), jobs):
            rows[row.model] = row
            append(row, written)
    ordered = [rows[member.name] for member in members]
    write_text(folder / "engines.json", json.dumps([row.to_json() for row in ordered], indent=1) + "\n")
    write_text(folder / "engines.md", as_markdown(ordered, written))
    return ordered


def _died(name: str) -> Deployment:
    family = next(member.family for member in MEMBERS if member.name == name)
    return Deployment(name, family, failed={"lowering": "the process that tried it died"})
