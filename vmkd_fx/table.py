"""Plain text tables, without a dependency: an edge box prints them too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> str:
    """Rows under a header, columns aligned; the columns named in `right` are flush right, None is an empty
    cell.
    """
    cells = [[str(h) for h in header]] + [["" if c is None else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    flush_right = [name in right for name in header]

    def line(row: Sequence[str]) -> str:
        padded = zip(row, widths, flush_right, strict=True)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in padded).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def in_millions(count: int | None) -> str | None:
    """Parameters as "18.528 M"."""
    return None if count is None else f"{count / 1e6:.3f} M"


def in_billions(count: int | None) -> str | None:
    """Multiply-adds as "3.785 G"."""
    return None if count is None else f"{count / 1e9:.3f} G"
