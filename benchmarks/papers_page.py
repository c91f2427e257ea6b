"""Tables between markers of a page that people write around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vmkd_fx.errors import OutputError
from vmkd_fx.files import write_text


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; None is an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join("" if c is None else str(c) for c in line) + " |" for line in lines)


def check_page(page: Path, name: str) -> None:
    """Raises:
    OutputError: the page is not there, or has no place of this name.
    """
    _split(page, name)


def write_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`; the page appears whole.

    Raises:
        OutputError: the page is not there, or has no such place, or cannot be written.
    """
    before, after = _split(page, name)
    write_text(page, f"{before}\n\n{text.strip()}\n\n{after}")


def _split(page: Path, name: str) -> tuple[str, str]:
    """What stands up to the first marker, and from the second on."""
    begin, end = (f"<!-- {name}: {place} -->" for place in ("begin", "end"))
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise OutputError(f"{page} needs one line {begin!r} and below it one line {end!r} to write between")
    first, last = text.index(begin) + len(begin), text.index(end)
    return text[:first], text[last:]
