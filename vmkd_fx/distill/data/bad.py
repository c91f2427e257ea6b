"""Images that cannot be read: replaced by a neighbour, counted, named, and at some point too many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, TypeVar

from PIL import Image

from vmkd_fx.errors import DataError

_logger = logging.getLogger(__name__)
_SHOWN = 10

T = TypeVar("T")


class Source(Protocol):
    """Images by number, each with its class."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image in RGB, decoded, and its class; any error says that it cannot be read."""
        ...

    def describe(self, index: int) -> str:
        """Where it comes from, for a person."""
        ...


class Bad(NamedTuple):
    """An image that cannot be read, and why."""

    number: int
    name: str
    reason: str


def read_nearest(source: Source, index: int, most: int) -> tuple[Image.Image, int, list[Bad]]:
    """Image `index`, or the next after it that can be read, its class, and the bad ones passed over.

    After more than `most` bad ones in a row the image is a black pixel; there are too many bad ones then.
    """
    bad: list[Bad] = []
    while len(bad) <= most and len(bad) < len(source):
        place = (index + len(bad)) % len(source)
        found = try_read(source, place, _as_it_is)
        if not isinstance(found, Bad):
            return *found, bad
        bad.append(found)
    return Image.new("RGB", (1, 1)), 0, bad


def try_read(source: Source, index: int, then: Callable[[Image.Image], T]) -> tuple[T, int] | Bad:
    """What `then` makes of image `index`, and its class, or what is wrong with the image."""
    try:
        image, target = source.read(index)
        return then(image), target
    except DataError as error:
        return Bad(index, source.describe(index), str(error))
    # Decoders meet damaged files with errors of any kind.
    except Exception as error:
        first_line = (str(error).strip() or "no reason given").splitlines()[0]
        return Bad(index, source.describe(index), f"{type(error).__name__}: {first_line}")


def _as_it_is(image: Image.Image) -> Image.Image:
    return image


class BadImages:
    """The bad images that one process met in one part of a data set.

    Args:
        part: "training" or "validation", for messages.
        images: how many there are.
        share: of them that may be bad.
    """

    def __init__(self, part: str, images: int, share: float) -> None:
        self.part, self.images = part, images
        self.most = min(int(images * share), images - 1)
        self.found: dict[int, Bad] = {}

    def note(self, found: Iterable[Bad]) -> None:
        """Count and log the images that are new to it.

        Raises:
            DataError: they are too many.
        """
        for bad in found:
            if bad.number not in self.found:
                self.found[bad.number] = bad
                what = "replaced by the next one" if self.part == "training" else "left out"
                _logger.warning(
                    "%s image %s cannot be read and is %s: %s", self.part, bad.name, what, bad.reason
                )
        if len(self.found) > self.most:
            shown = "\n".join(f"  {bad.name}: {bad.reason}" for bad in [*self.found.values()][:_SHOWN])
            more = f"\n  and {len(self.found) - _SHOWN} more" if len(self.found) > _SHOWN else ""
            raise DataError(
                f"{len(self.found)} of {self.images} {self.part} images cannot be read and at most "
                f"{self.most} may be bad; mend or remove them, or allow more with data.max_bad (a share):\n"
                f"{shown}{more}"
            )
