"""A bundle: what goes to a device, and the proof that it arrived as it was sent.

    model.onnx                                the graph
    model.onnx.data                           its weights, where it is too large for one file
    model.tensorrt-rtx-sm86-sm89.engine       engines, none or several
    manifest.json                             sizes, hashes, preprocessing, labels, ledger

It is a folder, or one file (`packed.py`) where its name ends in ".vmkd". It appears whole or not at all, and
everything in it is checked before anything in it is used.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmkd_fx.deploy.manifest import (
    LARGEST_MANIFEST,
    LARGEST_ONNX,
    MANIFEST,
    ONNX,
    EngineInfo,
    Manifest,
    parse_manifest,
)
from vmkd_fx.deploy.onnx_wire import external_files
from vmkd_fx.deploy.packed import SUFFIX, begins_packed, read_packed
from vmkd_fx.deploy.places import Place, copy, open_plain, sha256, whole
from vmkd_fx.errors import BundleError


@dataclass(frozen=True)
class Bundle:
    """A bundle, opened: what it says it holds, and where that lies.

    Attributes:
        path: the folder or the file.
        manifest: what it says about itself.
        places: where each file of the manifest lies.
    """

    path: Path
    manifest: Manifest
    places: dict[str, Place]

    @property
    def packed(self) -> bool:
        """Whether it is one file."""
        return any(place.path == self.path for place in self.places.values())

    @property
    def engines(self) -> dict[str, EngineInfo]:
        """The engines by file name, and what each was built for."""
        return {name: f.engine for name, f in self.manifest.files.items() if f.engine is not None}

    def read(self, name: str) -> bytes:
        """The contents of one of its files, checked as they are read.

        Raises:
            BundleError: there is no such file, or it changed.
        """
        if name not in self.places:
            raise BundleError(f"{self.path} holds no {name}; it holds {', '.join(self.places)}")
        data = self.places[name].read()
        self._compare(name, hashlib.sha256(data).hexdigest())
        return data

    def check(self, name: str) -> None:
        """Raise a BundleError if one of its files is not what the manifest says."""
        self._compare(name, sha256(self.places[name]))

    def read_graph(self) -> bytes:
        """The ONNX graph, checked; it names no file outside the bundle.

        Raises:
            BundleError: it changed, or names one.
        """
        if self.places[ONNX].size > LARGEST_ONNX:
            raise BundleError(f"{self.path}: an ONNX graph has {LARGEST_ONNX:,} bytes at most")
        graph = self.read(ONNX)
        try:
            foreign = set(external_files(graph)) - set(self.manifest.weights)
        except BundleError as error:
            raise BundleError(f"{self.path}: {ONNX} cannot be read: {error}") from error
        if foreign:
            raise BundleError(
                f"{self.path}: {ONNX} keeps weights in {', '.join(map(ascii, sorted(foreign)))}, "
                f"and the bundle's own are {', '.join(self.manifest.weights) or 'none'}"
            )
        return graph

    @contextmanager
    def unpacked(self) -> Iterator[Path]:
        """A folder with `model.onnx` and its weights as plain files, for what reads nothing else.

        That is the bundle itself, or a private temporary copy where it is packed.

        Raises:
            BundleError: a file changed.
        """
        if not self.packed:
            yield self.path
            return
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            for name in (ONNX, *self.manifest.weights):
                with (Path(folder) / name).open("wb") as file:
                    copy(self.places[name], self.manifest.files[name].sha256, file)
            yield Path(folder)

    def _compare(self, name: str, found: str) -> None:
        expected = self.manifest.files[name].sha256
        if found != expected:
            raise BundleError(
                f"{self.path}: {name} was changed: its SHA-256 is {found[:12]}…, "
                f"the manifest says {expected[:12]}…; copy it again"
            )


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Check everything in the bundle at `path`, a folder or a file, and return it.

    Raises:
        BundleError: it is not a bundle, or a file is missing, changed, or not a plain file.
    """
    bundle, _ = read_bundle_and_graph(path)
    return bundle


def read_bundle_and_graph(path: str | os.PathLike[str]) -> tuple[Bundle, bytes]:
    """`read_bundle`, and the contents of `model.onnx` that were checked."""
    bundle = open_bundle(path)
    for name in bundle.places:
        if name != ONNX:
            bundle.check(name)
    return bundle, bundle.read_graph()


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """The bundle at `path` with its manifest and the sizes of its files checked, and their contents not.

    Raises:
        BundleError: it is not a bundle, or a file is missing or of another size.
    """
    path = Path(path)
    if path.is_file():
        path = path.resolve()
        return Bundle(path, *read_packed(path))
    manifest = _read_manifest(path)
    places = {name: whole(path / name) for name in manifest.files}
    for name, place in places.items():
        expected = manifest.files[name].bytes
        if place.size != expected:
            raise BundleError(
                f"{place.path} has {place.size:,} bytes, the manifest says {expected:,}: copy it again"
            )
    return Bundle(path, manifest, places)


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is meant as a bundle: a folder, or a file that is named or begins like a packed one."""
    path = Path(path)
    return path.is_dir() or (path.is_file() and (path.suffix == SUFFIX or begins_packed(path.resolve())))


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        file = open_plain(path)
    except BundleError as error:
        raise BundleError(f"{folder} is not a bundle: it holds no file {MANIFEST} ({error})") from error
    with file:
        return parse_manifest(file.read(LARGEST_MANIFEST + 1), path)
