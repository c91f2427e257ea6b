"""The folder of a cache: `cache.json` says of what it is, `epoch-00007/00012.safetensors` holds rows.

The images of an epoch stand in the order in which training asks for them, cut into shards of `rows` each. A
shard appears whole or not at all and depends on nothing but its number, so any number of processes, now or
later, may add what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmkd_fx.distill.cache.form import Form
from vmkd_fx.distill.differences import differences
from vmkd_fx.errors import CacheError
from vmkd_fx.files import write_text

MANIFEST = "cache.json"
FORMAT = 1
_STALE_SECONDS = 3600


@dataclass(frozen=True)
class Manifest:
    """What a cache is of.

    Attributes:
        teacher: its name, weights and how it was run, see `teacher_identity`.
        images: the data set, its transforms and the seed, see `data_identity`.
        made: model, options and checkpoint as the recipe named them; nothing is decided by them.
        count: images in an epoch.
        rows: images in a shard, a power of two.
        form: what a row holds.
    """

    teacher: dict[str, Any]
    images: dict[str, Any]
    made: dict[str, Any]
    count: int
    rows: int
    form: Form

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return {"format": FORMAT, **vars(self), "form": self.form.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """The inverse of `to_json`."""
        data = dict(data)
        if (found := data.pop("format")) != FORMAT:
            raise ValueError(f"format {found}, this version reads {FORMAT}")
        return cls(**{**data, "form": Form.from_json(data["form"])})

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what the rows hold."""
        return {key: value for key, value in _plain(self.to_json()).items() if key != "made"}

    @property
    def digest(self) -> str:
        """Of the identity, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CacheFolder:
    """A cache on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def create(cls, path: str | os.PathLike[str], manifest: Manifest) -> CacheFolder:
        """The cache at `path`, made if there is none; what is there must be the same.

        Raises:
            CacheError: the folder holds a cache of something else; says what differs.
            OutputError: it cannot be written to.
        """
        path = Path(path)
        if (path / MANIFEST).exists():
            found = cls.open(path)
            if changes := differences(found.manifest.identity, manifest.identity):
                raise CacheError(
                    f"{path} is a cache of something else: {'; '.join(changes)}. Give this one a folder of "
                    "its own, or remove that one"
                )
            return found
        write_text(path / MANIFEST, json.dumps(_plain(manifest.to_json()), indent=1) + "\n")
        return cls(path, manifest)

    @classmethod
    def open(cls, path: str | os.PathLike[str], place: int = 0) -> CacheFolder:
        """The cache at `path`, or of the teacher number `place` in the folder that `vmkd cache` wrote.

        Raises:
            CacheError: there is none, or what it is of cannot be read.
        """
        path = Path(path)
        file = path / MANIFEST
        if not file.exists():
            file = next(iter(sorted(path.glob(f"{place}-*/{MANIFEST}"))), file)
        if not file.exists():
            others = sorted(other.parent.name for other in path.glob(f"*/{MANIFEST}"))
            known = f"it holds {', '.join(others)}: name one of these" if others else ""
            written = f"write one with vmkd cache recipe.yaml --out {path}"
            raise CacheError(f"there is no cache {path} for teacher {place}, from 0; {known or written}")
        try:
            return cls(file.parent, Manifest.from_json(json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CacheError(f"{file} is damaged or was written by something else ({error})") from error

    @property
    def shards(self) -> int:
        """Of one epoch."""
        return -(-self.manifest.count // self.manifest.rows)

    def span(self, shard: int) -> range:
        """The places in the epoch's order that a shard holds."""
        rows = self.manifest.rows
        return range(shard * rows, min((shard + 1) * rows, self.manifest.count))

    def file(self, epoch: int, shard: int) -> Path:
        """Where a shard is, or would be."""
        return self.path / f"epoch-{epoch:05}" / f"{shard:05}.safetensors"

    def about(self, epoch: int, shard: int) -> dict[str, Any]:
        """What a shard says that it is."""
        return {"cache": self.manifest.digest, "epoch": epoch, "shard": shard}

    def tidy(self) -> None:
        """Remove what killed processes left half written; the files of a running one are younger."""
        for left in self.path.glob("epoch-*/.*.tmp"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    left.unlink()

    def missing(self, epochs: Iterable[int]) -> Iterator[tuple[int, int]]:
        """The (epoch, shard) that are not there."""
        for epoch in epochs:
            for shard in range(self.shards):
                if not self.file(epoch, shard).exists():
                    yield epoch, shard

    def check_epochs(self, epochs: int) -> None:
        """Refuse a cache that lacks anything of the epochs 0 to `epochs` - 1.

        Raises:
            CacheError: says from where on it has to be filled.
        """
        missing = list(self.missing(range(epochs)))
        if missing:
            (epoch, _), parts = missing[0], epochs * self.shards
            raise CacheError(
                f"{self.path} lacks {len(missing)} of the {parts} files of {epochs} epochs, the first in "
                f"epoch {epoch}, counted from 0; vmkd cache with the same recipe and --epochs "
                f"{epoch}:{epochs} adds them"
            )


def _plain(value: Any) -> Any:
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value))
