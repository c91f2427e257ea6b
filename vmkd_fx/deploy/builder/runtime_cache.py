"""TensorRT-RTX's runtime cache in a file: kernels that it compiled on this device, for the next start.

TensorRT-RTX builds ahead of time what does not depend on the device, and compiles the rest as it first runs.
A cache belongs to one device, driver and version; another one's is left aside, and written over at the end.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmkd_fx.errors import OutputError
from vmkd_fx.files import writing

LARGEST = 2**30


class RuntimeCache:
    """The file `path`, and the one cache that all execution contexts of an engine share."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Nothing is read yet; the file need not exist."""
        self._path = Path(path)
        self._cache: Any = None
        self._before = b""

    def attach(self, config: Any) -> None:
        """Give the cache to a configuration (IRuntimeConfig) that an execution context is made with."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._before = self._read()
            if self._before and not self._cache.deserialize(self._before):
                self._before = b""
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write what was compiled to the file, whole or not at all, if it is more than before.

        A cache is a convenience: where it cannot be written, nothing is said.
        """
        found = bytes(self._cache.serialize()) if self._cache is not None else b""
        if found and found != self._before:
            with suppress(OutputError), writing(self._path) as temporary:
                temporary.write_bytes(found)
            self._before = found

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes() if self._path.stat().st_size <= LARGEST else b""
        except OSError:
            return b""
