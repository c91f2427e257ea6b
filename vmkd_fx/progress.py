"""Progress of anything slow: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


class Progress(Generic[T]):
    """Counts finished work and shows it on standard error; made by `progress`."""

    def __init__(self, work: Iterable[T] | int, description: str, initial: int, show: bool) -> None:
        self._work: Iterable[Any] = range(initial, work) if isinstance(work, int) else work
        self._total = work if isinstance(work, int) else len(work) if isinstance(work, Sized) else None
        self._description = description
        self._done = initial
        self._note = ""
        self._show = show
        self._started = self._printed = time.monotonic()
        self._bar = _bar(self._total, description, initial) if show and sys.stderr.isatty() else None
        if show and self._bar is None:
            self._print("started")

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._work:
                yield item
                self.update()

    def __enter__(self) -> Progress[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("done" if kind is None else "stopped")

    def update(self, count: int = 1) -> None:
        """Say that `count` more pieces are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._show and time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print("")

    def note(self, text: str) -> None:
        """Show `text` beside the count from now on."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self, word: str = "done") -> None:
        """End the bar, or print a last line that ends in `word`."""
        if self._bar is not None:
            self._bar.close()
        elif self._show:
            self._print(word)
        self._show, self._bar = False, None

    def _print(self, word: str) -> None:
        self._printed = time.monotonic()
        total = "" if self._total is None else f"/{self._total}"
        parts = [f"{self._description}: {self._done}{total}", f"{self._printed - self._started:.0f} s"]
        parts += [part for part in (self._note, word) if part]
        print(", ".join(parts), file=sys.stderr, flush=True)


@overload
def progress(work: int, description: str, *, initial: int = 0, show: bool = True) -> Progress[int]: ...
@overload
def progress(work: Iterable[T], description: str, *, initial: int = 0, show: bool = True) -> Progress[T]: ...
def progress(
    work: Iterable[Any] | int, description: str, *, initial: int = 0, show: bool = True
) -> Progress[Any]:
    """Follow `work`: iterate over the result, or give a number of pieces and call `update` in a `with` block.

    Args:
        work: what to iterate over, or how many pieces there are.
        description: what is being done, in a word or two.
        initial: pieces that were done before.
        show: False counts in silence.

    On a terminal this is tqdm's bar where tqdm is installed. Elsewhere it is one line at the start, one every
    ten seconds and one at the end.
    """
    return Progress(work, description, initial, show)


def _bar(total: int | None, description: str, initial: int) -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return None
    return tqdm(total=total, desc=description, initial=initial, dynamic_ncols=True)
