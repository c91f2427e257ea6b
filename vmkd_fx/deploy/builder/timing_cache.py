"""TensorRT's timing cache in a file: what one build measured, the next one need not measure again.

A cache is a convenience. One that is damaged, or from another GPU or version, is replaced and never an error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vmkd_fx.files import writing

LARGEST = 2**30


class TimingCache:
    """The file `path` and the cache of one build."""

    def __init__(self, path: str | os.PathLike[str], messages: Any) -> None:
        """Nothing is read yet.

        Args:
            path: the file; it need not exist.
            messages: the package's collector, where complaints about the file are dropped.
        """
        self._path = Path(path)
        self._messages = messages
        self._before = b""

    def attach(self, config: Any) -> None:
        """Give the builder what the file holds, or an empty cache."""
        self._before = self._read()
        if not (self._before and self._set(config, self._before)):
            self._before = b""
            self._set(config, b"")
        self._messages.errors.clear()

    def keep(self, config: Any) -> None:
        """Write what the builder knows now to the file, whole or not at all, if it is more than before.

        Raises:
            OutputError: the file cannot be written.
        """
        cache = config.get_timing_cache()
        found = bytes(cache.serialize()) if cache is not None else b""
        if found and found != self._before:
            with writing(self._path) as temporary:
                temporary.write_bytes(found)

    def _read(self) -> bytes:
        try:
            if self._path.stat().st_size > LARGEST:
                return b""
            return self._path.read_bytes()
        except OSError:
            return b""

    @staticmethod
    def _set(config: Any, contents: bytes) -> bool:
        cache = config.create_timing_cache(contents)
        return cache is not None and bool(config.set_timing_cache(cache, ignore_mismatch=False))
