"""Every method on the handwritten digits, against the same student alone and against plain KD.

    python benchmarks/papers.py [--seeds 5] [--methods kd,std] [--steps N] [--out docs/papers.md]

Trains each teacher of `papers_tasks.py` once and each of its rows with every seed, and prints mean and
standard deviation of the accuracy on the 797 held-out digits. What is finished stands in the folder
`--cache`, so a run that was stopped goes on where it was; remove the folder after a change of the code.
Without `--methods` the tables are also written into `--out`, between its markers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from papers_page import check_page, markdown, write_between
from papers_run import Results, Scores, perform_all
from papers_tasks import (
    FAMILIES,
    LABELLED,
    TEACHER_LABELLED,
    TEACHERS,
    Config,
    Family,
    Row,
    in_folder,
    student_recipe,
    teacher_recipe,
)

from vmkd_fx.distill.methods import PRESETS
from vmkd_fx.distill.recipe import Recipe
from vmkd_fx.errors import UnknownNameError, VmkdError
from vmkd_fx.files import make_folder
from vmkd_fx.table import table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "papers.md"
MARKER = "digits"
HEADER = ("method", "teachers", "accuracy", "spread", "over alone", "over kd")

Selection = list[tuple[Family, list[Row]]]
Runs = Mapping[tuple[str, str, int], Recipe]
"""The training of each family, label and seed."""


def selection(names: Sequence[str] | None) -> Selection:
    """Families with the rows that were asked for, and the two that these are compared with.

    Raises:
        UnknownNameError: no row has such presets.
    """
    known = sorted({row.preset for family in FAMILIES for row in family.rows})
    for name in names or ():
        if name not in known:
            raise UnknownNameError("method", name, known)
    found = []
    for family in FAMILIES:
        asked = [row for row in family.rows if (names is None or row.preset in names) and not missing(row)]
        if asked:
            found.append((family, [row for row in family.rows if row in asked or row in family.rows[:2]]))
    return found


def missing(row: Row) -> str | None:
    """The first preset of a row that there is not; None where all are there."""
    return next((method["preset"] for method in row.methods if method["preset"] not in PRESETS), None)


def train_all(chosen: Selection, args: argparse.Namespace) -> tuple[Results, Runs, Mapping[str, Recipe]]:
    """Train what has no result yet: teachers, then students.

    Raises:
        VmkdError: says which trainings failed; the others are kept.
    """
    cache = make_folder(args.cache)
    results = Results(cache / "results.jsonl")
    teachers = {
        name: in_folder(teacher_recipe(name, family, args.teacher_steps), cache / "teachers")
        for family, rows in chosen
        for name in TEACHERS
        if any(name in row.teachers for row in rows)
    }
    refuse(perform_all(list(teachers.items()), results, "teachers", args.workers, keep=True))
    runs = {}
    for family, rows in chosen:
        for row in rows:
            known = [trained(name, teachers[name]) for name in row.teachers]
            for seed in range(args.seeds):
                recipe = student_recipe(family, row, known, seed, args.steps)
                runs[family.name, row.label, seed] = in_folder(recipe, cache / "students")
    jobs = [(f"{family}, {label}, seed {seed}", recipe) for (family, label, seed), recipe in runs.items()]
    refuse(perform_all(jobs, results, "students", args.workers))
    return results, runs, teachers


def refuse(failed: Sequence[str]) -> None:
    if failed:
        raise VmkdError("these trainings failed, the others are kept:\n" + "\n".join(failed))


def trained(name: str, recipe: Recipe) -> Config:
    """A teacher as a student's recipe names it."""
    return {**TEACHERS[name], "checkpoint": str(Path(recipe.out) / "last.safetensors")}


def lines(
    family: Family, rows: Sequence[Row], results: Results, runs: Runs, seeds: int
) -> Iterator[list[str]]:
    """The lines of a family's table, one for each prediction; gains are over the same seeds."""

    def scores(row: Row) -> list[Scores]:
        return [found for seed in range(seeds) if (found := results.of(runs[family.name, row.label, seed]))]

    bases = [[one["class"] for one in scores(row)] for row in family.rows[:2]]
    for row in rows:
        found = scores(row)
        for prediction in found[0]:
            values = [one[prediction] for one in found]
            label = row.label if prediction == "class" else "... mean of its heads"
            gains = [
                gain(values, base) if row is not other else ""
                for base, other in zip(bases, family.rows[:2], strict=True)
            ]
            yield [label, ", ".join(row.teachers), percent(statistics.mean(values)), spread(values), *gains]


def gain(values: Sequence[float], base: Sequence[float]) -> str:
    """Mean and standard deviation of the differences, in points."""
    gains = [value - other for value, other in zip(values, base, strict=True)]
    return f"{100 * statistics.mean(gains):+.2f} ± {spread(gains)}"


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


def spread(values: Sequence[float]) -> str:
    return percent(statistics.stdev(values)) if len(values) > 1 else "-"


def page_text(
    chosen: Selection, results: Results, runs: Runs, teachers: Mapping[str, Recipe], args: argparse.Namespace
) -> str:
    """All tables in Markdown under a line that says how they came about."""
    parts = [
        f"Written by `benchmarks/papers.py`: {args.seeds} seeds, {LABELLED} labelled digits for a student "
        f"and {TEACHER_LABELLED} for a teacher, of which there is one ({args.teacher_steps} steps). Accuracy "
        "in per cent of the 797 held-out digits (one is 0.13), standard deviation over the seeds, and gains "
        "in points with theirs, seed by seed.",
        markdown(("teacher", "accuracy"), teacher_lines(results, teachers)),
    ]
    for family, rows in chosen:
        title = f"**{family.name}**, {args.steps or family.steps} steps"
        parts += [title, markdown(HEADER, lines(family, rows, results, runs, args.seeds))]
    return "\n\n".join(parts)


def teacher_lines(results: Results, teachers: Mapping[str, Recipe]) -> list[tuple[str, str]]:
    found = ((name, results.of(recipe)) for name, recipe in teachers.items())
    return [(name, percent(scores["class"])) for name, scores in found if scores]


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="every method on the handwritten digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of each student; default: what its family says")
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--methods", help="presets, joined by commas, 'vitkd+nkd' being one; default: all")
    parser.add_argument("--out", type=Path, help="page to write the tables into; default: docs/papers.md")
    parser.add_argument("--cache", type=Path, default=Path("papers-out"), help="where finished work is kept")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes; 0 trains in this one"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    page = args.out or (None if args.methods else PAGE)
    try:
        if page:
            check_page(page, MARKER)
        chosen = selection(args.methods.split(",") if args.methods else None)
        absent = {name for family in FAMILIES for row in family.rows if (name := missing(row))}
        if absent:
            print(f"left out, there is no preset {', '.join(sorted(absent))}", file=sys.stderr, flush=True)
        results, runs, teachers = train_all(chosen, args)
        print(table(("teacher", "accuracy"), teacher_lines(results, teachers), right=("accuracy",)))
        for family, rows in chosen:
            body = lines(family, rows, results, runs, args.seeds)
            print(f"\n{family.name}\n{table(HEADER, body, right=HEADER[2:])}")
        if page:
            write_between(page, MARKER, page_text(chosen, results, runs, teachers, args))
            print(f"\nwritten into {page}")
    except VmkdError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
