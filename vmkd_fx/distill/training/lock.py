"""One training at a time in a folder.

The lock is the system's, on the file `.lock`, and ends with the process that holds it, however that ends. So
a file that a killed process left locks nobody out. Its text says who holds it, for the one that is refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vmkd_fx.errors import OutputError

NAME = ".lock"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_held: set[Path] = set()
"""Files that this process holds: the system's lock keeps out other processes only."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for as long as the block runs.

    Raises:
        OutputError: another training holds it, or it cannot be written to.
    """
    path = folder.resolve() / NAME
    if path in _held:
        raise OutputError(f"{folder}: another training of this process is in that folder; give each its own")
    try:
        handle = _taken(path, folder)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _taken(path: Path, folder: Path) -> int:
    """The open file, locked, and with this process's name in it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, folder)
            # Its holder removes the file before letting go: then what was locked here is no longer there.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                os.truncate(handle, 0)
                os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    holder = os.read(handle, 4096)
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        _system_lock(handle)
    except OSError as error:
        # A file system without locks says so in another way; then only the name in the file can tell.
        if error.errno in _HELD_BY_ANOTHER or _runs_here(holder):
            raise OutputError(
                f"{folder}: another training is in that folder, {_said(holder)}; give this one a folder of "
                "its own, or wait for that one"
            ) from error


def _system_lock(handle: int) -> None:
    """Raises OSError where another process holds the file."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    # A record lock, which the workers that load images do not inherit when they are forked.
    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _named(holder: bytes) -> tuple[int, str] | None:
    try:
        content: dict[str, Any] = json.loads(holder)
        return int(content["pid"]), str(content["host"])
    except (ValueError, TypeError, KeyError):
        return None


def _said(holder: bytes) -> str:
    named = _named(holder)
    return "whose process is not known" if named is None else f"process {named[0]} on {named[1]}"


def _runs_here(holder: bytes) -> bool:
    named = _named(holder)
    if named is None or named[1] != socket.gethostname():
        return False
    try:
        os.kill(named[0], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
