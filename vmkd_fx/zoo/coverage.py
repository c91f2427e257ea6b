"""The coverage of the zoo as tables: CSV with a row a model; Markdown with totals, families, exceptions."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from vmkd_fx.zoo.row import UNKNOWN, Row

_COLUMNS: dict[str, Callable[[Row], object]] = {
    "model": lambda row: row.model,
    "family": lambda row: row.family,
    "parameters": lambda row: row.parameters,
    "nodes": lambda row: row.nodes,
    "trace": lambda row: row.trace or "yes",
    "open_share": lambda row: f"{row.open_share:.4f}",
    "fixed_size": lambda row: row.fixed_size,
    "blocks": lambda row: row.blocks,
    "stages": lambda row: row.stages,
    "unclear": lambda row: row.unclear,
    "timm": lambda row: row.timm or "agrees",
    "methods": lambda row: " ".join(name for name, reason in row.methods.items() if not reason),
    "round_trip": lambda row: "; ".join(f"{name}: {why or 'yes'}" for name, why in row.round_trip.items()),
    "numbers": lambda row: "; ".join(f"{name}: {why or 'yes'}" for name, why in row.numbers.items()),
    "closed": lambda row: "; ".join(f"{path}: {why}" for path, why in row.closed),
}


def as_csv(rows: Iterable[Row]) -> str:
    """One line a model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([read(row) for read in _COLUMNS.values()] for row in rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Row], stamp: str) -> str:
    """Totals, one line a family, and every exception by name."""
    methods = list(dict.fromkeys(name for row in rows for name in row.methods))
    numbers = ("numbers",) if any(row.numbers for row in rows) else ()
    parts = [
        "# Coverage of timm's models",
        f"Written by `vmkd sweep` with {stamp.rpartition(', ')[0]}, on the meta device: structure alone. "
        "Real numbers, in both modes and after training, are checked for a small member of each family by "
        "the tests, and by `vmkd sweep --full` for the smallest published one.",
        "A model that timm makes without a classifier is given one of 1000 classes, for a student has one.",
        "## Totals",
        markdown_table(("what", "models"), _totals(rows, methods)),
        "## Families",
        markdown_table(
            ("family", "models", "traced", "as timm knows it", *methods, "round trip", *numbers),
            [_family_line(name, found, methods, numbers) for name, found in sorted(_families(rows).items())],
        ),
        "## Exceptions",
        _exceptions(rows),
        "## Closed modules",
        _closed(rows),
        "## Fixed to the size of their images",
        _listed(row.family for row in rows if row.fixed_size)
        or "None: every graph takes images of any size that its model takes.",
    ]
    return "\n\n".join(parts) + "\n"


def _totals(rows: Sequence[Row], methods: Sequence[str]) -> list[tuple[str, str]]:
    count = len(rows)
    known = [row for row in rows if row.timm != UNKNOWN]
    lines = [
        ("models", str(count)),
        ("traced and run in both modes", f"{sum(not row.trace for row in rows)} of {count}"),
        (
            "at least 99 % of the layers' parameters in open nodes",
            f"{sum(row.open_share >= 0.99 for row in rows)} of {count}",
        ),
        ("anatomy agrees with timm's feature list", f"{sum(not row.timm for row in known)} of {len(known)}"),
        ("no branch unclear", f"{sum(not row.unclear and not row.trace for row in rows)} of {count}"),
    ]
    lines += [
        (f"method {name} applies", f"{sum(row.methods.get(name) == '' for row in rows)} of {count}")
        for name in methods
    ]
    for name in dict.fromkeys(name for row in rows for name in row.round_trip):
        tried = [row for row in rows if name in row.round_trip]
        given_back = sum(not row.round_trip[name] for row in tried)
        lines.append((f"strip gives back what was before {name}", f"{given_back} of {len(tried)}"))
    numbered = [row for row in rows if row.numbers]
    if not numbered:
        return lines
    right = sum(not any(row.numbers.values()) for row in numbered)
    return [*lines, ("right on real numbers", f"{right} of {len(numbered)} tried")]


def _family_line(
    name: str, rows: Sequence[Row], methods: Sequence[str], numbers: Sequence[str]
) -> tuple[str, ...]:
    trips = [why for row in rows for why in row.round_trip.values()]
    right = [not any(row.numbers.values()) for row in rows if row.numbers]
    known = [row for row in rows if row.timm != UNKNOWN]
    return (
        name,
        str(len(rows)),
        _share(sum(not row.trace for row in rows), len(rows)),
        _share(sum(not row.timm for row in known), len(known)),
        *(_share(sum(row.methods.get(method) == "" for row in rows), len(rows)) for method in methods),
        _share(sum(not why for why in trips), len(trips)),
        *(_share(sum(right), len(right)) for _ in numbers),
    )


def _share(part: int, whole: int) -> str:
    return "" if not whole else "all" if part == whole else f"{part} of {whole}"


def _families(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.family].append(row)
    return found


def _exceptions(rows: Sequence[Row]) -> str:
    lines = [f"- `{row.model}`, {name}: {why}" for row in rows for name, why in row.faults.items()]
    return "\n".join(lines) or "None."


def _closed(rows: Sequence[Row]) -> str:
    """Closed modules by reason, each with the families where it occurs."""
    where: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for _, reason in row.closed:
            where[reason].add(row.family)
    lines = [f"- {', '.join(sorted(families))}: {reason}" for reason, families in sorted(where.items())]
    return "\n".join(lines) or "None hides a layer or failed to open."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(Counter(names).items()))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown writes it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
