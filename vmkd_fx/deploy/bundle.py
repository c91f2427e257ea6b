"""A bundle: the folder that goes to a device, and the proof that it arrived as it was sent.

    model.onnx                                the graph
    model.tensorrt-rtx-sm86-sm89.engine       engines, none or several
    manifest.json                             sizes, hashes, preprocessing, labels, ledger

A bundle appears whole or not at all, and everything in it is checked before anything in it is used.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vmkd_fx import __version__
from vmkd_fx.deploy.manifest import MANIFEST, ONNX, EngineInfo, FileEntry, Manifest, read_manifest
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.errors import BundleError, OutputError
from vmkd_fx.files import appearing, sha256, write_text, writing
from vmkd_fx.steps import Ledger, Step

_VERSIONS = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow")


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked."""

    path: Path
    manifest: Manifest

    @property
    def onnx(self) -> Path:
        """The ONNX file."""
        return self.path / ONNX

    @property
    def engines(self) -> dict[Path, EngineInfo]:
        """The engines and what each was built for."""
        return {self.path / f.name: f.engine for f in self.manifest.files.values() if f.engine is not None}


def write_bundle(
    path: str | os.PathLike[str],
    *,
    onnx: str | os.PathLike[str],
    preprocess: Preprocess,
    labels: Sequence[str],
    ledger: Ledger,
    name: str,
    engines: Sequence[tuple[str | os.PathLike[str], EngineInfo]] = (),
) -> Path:
    """Write a bundle of copies of `onnx` and `engines` to the folder `path`, whole or not at all.

    An earlier bundle at `path` is replaced, and only when the new one stands.

    Raises:
        BundleError: `onnx` or an engine is not there.
        OutputError: `path` is something else than a bundle, or cannot be written.
    """
    path = Path(path).resolve()
    sources: list[tuple[str, Path, EngineInfo | None]] = [(ONNX, Path(onnx), None)]
    sources += [(f"model.{info.suffix}", Path(engine), info) for engine, info in engines]
    for _, source, _ in sources:
        if not source.is_file():
            raise BundleError(f"there is no file {source} to put into the bundle {path}")
    refuse_foreign(path)
    with appearing(path) as folder:
        files = {}
        for file, source, info in sources:
            with writing(folder / file) as temporary:
                shutil.copyfile(source, temporary)
            files[file] = _entry(folder / file, info)
        manifest = Manifest(name, files, preprocess, tuple(labels), ledger, _created_with())
        write_text(folder / MANIFEST, manifest.to_text())
    return path


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Check everything in the bundle at `path` and return it.

    Raises:
        BundleError: it is not a bundle, or a file is missing, changed, or not a plain file.
    """
    path = Path(path)
    manifest = read_manifest(path)
    for entry in manifest.files.values():
        _verify(path / entry.name, entry)
    return Bundle(path, manifest)


def add_engine(bundle: Bundle, engine: bytes, info: EngineInfo, step: Step) -> Bundle:
    """Write an engine into `bundle` and its `step` into the ledger; one for the same target is replaced.

    The target is what `step.detail` begins with, up to a semicolon. The bundle on disk is whole at every
    moment: the former engine leaves the manifest before its file changes.

    Raises:
        OutputError: the bundle cannot be written to.
    """
    path = bundle.path / f"model.{info.suffix}"
    former = bundle.manifest
    if path.name in former.files:
        former = replace(former, files={n: f for n, f in former.files.items() if n != path.name})
        write_text(bundle.path / MANIFEST, former.to_text())
    with writing(path) as temporary:
        temporary.write_bytes(engine)
    mark = f"{info.target}; "
    steps = tuple(s for s in former.ledger.steps if not (s.name == step.name and s.detail.startswith(mark)))
    manifest = replace(
        former,
        files={**former.files, path.name: _entry(path, info)},
        ledger=replace(former.ledger, steps=(*steps, step)),
    )
    write_text(bundle.path / MANIFEST, manifest.to_text())
    return replace(bundle, manifest=manifest)


def _entry(path: Path, info: EngineInfo | None) -> FileEntry:
    return FileEntry(path.name, path.stat().st_size, sha256(path), info)


def _verify(path: Path, entry: FileEntry) -> None:
    if path.is_symlink() or not path.is_file():
        state = "is a link" if path.is_symlink() else "is missing"
        raise BundleError(f"{path} {state}: a bundle holds its files itself; copy it again")
    try:
        size, digest = path.stat().st_size, ""
        if size == entry.bytes:
            digest = sha256(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error
    if size != entry.bytes:
        raise BundleError(f"{path} has {size:,} bytes, the manifest says {entry.bytes:,}: copy it again")
    if digest != entry.sha256:
        raise BundleError(
            f"{path} was changed: its SHA-256 is {digest[:12]}…, "
            f"the manifest says {entry.sha256[:12]}…; copy it again"
        )


def refuse_foreign(path: Path) -> None:
    """Only nothing, an empty folder, or a bundle and nothing beside it may be replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"cannot write a bundle to {path}: it is a file; give a folder")
    found = {item.name for item in path.iterdir()}
    if not found:
        return
    try:
        foreign = found - {MANIFEST, *read_manifest(path).files}
    except BundleError as error:
        raise OutputError(f"cannot write a bundle to {path}: {error}; give another folder") from error
    if foreign:
        raise OutputError(f"cannot replace the bundle {path}: it also holds {', '.join(sorted(foreign))}")


def _created_with() -> dict[str, str]:
    versions = {"vmkd-fx": __version__, "python": platform.python_version()}
    for package in _VERSIONS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
