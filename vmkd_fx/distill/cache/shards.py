"""A file of a cache: some thousand rows as safetensors, with a checksum and what it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from vmkd_fx.distill.cache.form import Columns
from vmkd_fx.errors import CacheError
from vmkd_fx.files import writing

_KEY = "vmkd_cache"


def write_shard(path: Path, columns: Columns, about: Mapping[str, Any]) -> None:
    """Write `columns` whole or not at all; equal columns are equal files.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
    """
    # One key: the format stores several in random order.
    metadata = {_KEY: json.dumps({**about, "sha256": _checksum(columns)}, sort_keys=True)}
    data = safetensors.numpy.save(
        {name: np.ascontiguousarray(rows) for name, rows in columns.items()}, metadata
    )
    with writing(path) as temporary:
        temporary.write_bytes(data)


def read_shard(path: Path, about: Mapping[str, Any]) -> Columns:
    """The columns of a file that `write_shard` wrote with the same `about`.

    Raises:
        CacheError: it is damaged, or stands in another place than it was written for.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            found = json.loads((file.metadata() or {})[_KEY])
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # the format's errors, those of JSON and of files
        raise _damaged(path, str(error) or type(error).__name__) from error
    if found.pop("sha256", None) != _checksum(columns):
        raise _damaged(path, "wrong checksum")
    if found != dict(about):
        raise _damaged(path, f"it was written as {found}, not as {dict(about)}")
    return columns


def read_column(path: Path, name: str) -> NDArray[Any]:
    """One column of a file, without its checksum.

    Raises:
        CacheError: the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return file.get_tensor(name)
    except Exception as error:
        raise _damaged(path, str(error) or type(error).__name__) from error


def _damaged(path: Path, reason: str) -> CacheError:
    return CacheError(
        f"{path} is damaged ({reason}); run vmkd cache with --check: it makes damaged files anew"
    )


def _checksum(columns: Columns) -> str:
    digest = hashlib.sha256()
    for name, rows in sorted(columns.items()):
        digest.update(f"{name} {rows.dtype.name} {rows.shape};".encode())
        digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()
