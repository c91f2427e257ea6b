"""Where a file of a bundle lies: a whole file of a folder, a stretch of a packed one, or memory."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from vmkd_fx.errors import BundleError

_CHUNK = 1 << 20


class Source(Protocol):
    """What can be put into a bundle."""

    @property
    def size(self) -> int:
        """How many there are."""

    def chunks(self) -> Iterator[bytes]:
        """The contents, piece by piece."""


@dataclass(frozen=True)
class Held:
    """Contents that are in memory."""

    data: bytes

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        """The contents in one piece."""
        yield self.data


@dataclass(frozen=True)
class Place:
    """`size` bytes of the file `path` from `offset` on."""

    path: Path
    offset: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        """The contents, a mebibyte at a time.

        Raises:
            BundleError: the file is missing, a link, no plain file, or ends too early.
        """
        with open_plain(self.path) as file:
            try:
                file.seek(self.offset)
                left = self.size
                while left:
                    chunk = file.read(min(left, _CHUNK))
                    if not chunk:
                        raise BundleError(f"{self.path} ends too early: copy it again")
                    left -= len(chunk)
                    yield chunk
            except OSError as error:
                raise BundleError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def read(self) -> bytes:
        """The contents in memory."""
        return b"".join(self.chunks())


def sha256(source: Source) -> str:
    """Of the contents, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in source.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def copy(source: Source, expected: str, file: BinaryIO) -> None:
    """Write the contents of `source` to `file`.

    Raises:
        BundleError: their SHA-256 is not `expected`.
    """
    digest = hashlib.sha256()
    for chunk in source.chunks():
        digest.update(chunk)
        file.write(chunk)
    if digest.hexdigest() != expected:
        raise BundleError(f"{source} changed while it was copied: try again")


def whole(path: Path) -> Place:
    """All of the plain file `path`.

    Raises:
        BundleError: there is none.
    """
    with open_plain(path) as file:
        return Place(path, 0, os.fstat(file.fileno()).st_size)


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file to read; a link is not followed, and a pipe or a device is not waited for.

    Raises:
        BundleError: it is missing, a link, or no plain file.
    """
    flags = os.O_RDONLY | sum(
        getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
    )
    try:
        state = path.lstat()
        if stat.S_ISLNK(state.st_mode):
            raise BundleError(f"{path} is a link: a bundle holds its files itself; copy it again")
        if not stat.S_ISREG(state.st_mode):
            raise BundleError(f"{path} is no plain file: a bundle holds nothing else; copy it again")
        file = os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing: a bundle holds its files itself; copy it again") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # exchanged between the two looks
        file.close()
        raise BundleError(f"{path} is no plain file: a bundle holds nothing else; copy it again")
    return file
