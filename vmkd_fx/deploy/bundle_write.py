"""Writing bundles: a new one, one more engine, the sign of a verification.

Each change is one rename. Whoever is killed on the way leaves the bundle as it was, and at most a file beside
it that the next change removes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from vmkd_fx.deploy.bundle import Bundle, open_bundle
from vmkd_fx.deploy.manifest import (
    MANIFEST,
    ONNX,
    EngineInfo,
    FileEntry,
    Hazard,
    Manifest,
    Verified,
    is_plain_name,
    parse_manifest,
)
from vmkd_fx.deploy.onnx_wire import external_files
from vmkd_fx.deploy.packed import SUFFIX, write_packed
from vmkd_fx.deploy.places import Held, Source, copy, sha256, whole
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.deploy.versions import versions
from vmkd_fx.errors import BundleError, OutputError
from vmkd_fx.files import appearing, writing
from vmkd_fx.frames import Frames
from vmkd_fx.steps import Ledger, Step

# What a writer that was killed leaves in a folder.
_LEFT_BEHIND = re.compile(r"\.(model|manifest)\..*\.tmp|model\..*\.engine")


def write_bundle(
    path: str | os.PathLike[str],
    *,
    onnx: str | os.PathLike[str],
    preprocess: Preprocess,
    labels: Sequence[str],
    ledger: Ledger,
    name: str,
    engines: Sequence[tuple[str | os.PathLike[str], EngineInfo]] = (),
    precision: str = "fp32",
    kept: Sequence[str] = (),
    frames: Frames | None = None,
    hazards: Sequence[Hazard] = (),
) -> Path:
    """Write a bundle of copies of `onnx` and `engines` to `path`, whole or not at all.

    `path` is a folder, or one file where it ends in ".vmkd". An earlier bundle there is replaced, and only
    when the new one stands. The files that the graph keeps its weights in are taken along.

    Raises:
        BundleError: `onnx`, an engine or the weights are not there, or a label cannot be printed.
        OutputError: `path` is something else than a bundle, or cannot be written.
    """
    path = Path(path).resolve()
    onnx = Path(onnx)
    given: list[tuple[str, str, Path, EngineInfo | None]] = [("onnx", ONNX, onnx, None)]
    given += [("weights", file, onnx.with_name(file), None) for file in _weights(onnx)]
    given += [("engine", f"model.{info.suffix}", Path(engine), info) for engine, info in engines]
    for _, _, source, _ in given:
        if not source.is_file():
            raise BundleError(f"there is no file {source} to put into the bundle {path}")
    refuse_foreign(path)
    sources = {file: whole(source.resolve()) for _, file, source, _ in given}
    files = {file: _entry(kind, sources[file], info) for kind, file, _, info in given}
    manifest = Manifest(
        name,
        files,
        preprocess,
        tuple(labels),
        ledger,
        versions(),
        precision=precision,
        kept=tuple(kept),
        frames=frames,
        hazards=tuple(hazards),
    )
    _refuse_unreadable(manifest, path)
    (_write_packed if path.suffix == SUFFIX else _write_folder)(path, manifest, sources)
    return path


def add_engine(bundle: Bundle, engine: bytes, info: EngineInfo, step: Step) -> Bundle:
    """Write an engine into `bundle` and its `step` into the ledger; one for the same target is replaced.

    The target is what `step.detail` begins with, up to a semicolon. The bundle on disk is the old one or the
    new one at every moment.

    Raises:
        BundleError: the bundle's graph is no longer the one that the engine was built from.
        OutputError: the bundle cannot be written to.
    """
    with _alone(bundle.path):
        manifest = _current(bundle)
        former = {n for n, f in manifest.files.items() if f.engine and f.engine.suffix == info.suffix}
        # Never the former one's name: until the manifest is replaced, it has to find what it names.
        name = next(n for n in (f"model.{info.suffix}", f"model.again.{info.suffix}") if n not in former)
        files = {n: f for n, f in manifest.files.items() if n not in former}
        files[name] = _entry("engine", Held(engine), info)
        mark = f"{info.target}; "
        steps = manifest.ledger.steps
        steps = tuple(s for s in steps if not (s.name == step.name and s.detail.startswith(mark)))
        ledger = replace(manifest.ledger, steps=(*steps, step))
        return _rewrite(bundle, replace(manifest, files=files, ledger=ledger), {name: Held(engine)})


def record_verified(bundle: Bundle, verified: Verified) -> Bundle:
    """Write the sign of a verification into the manifest, in place of a former one.

    Raises:
        BundleError: the bundle's graph is no longer the one that was verified.
        OutputError: the bundle cannot be written to.
    """
    with _alone(bundle.path):
        return _rewrite(bundle, replace(_current(bundle), verified=verified), {})


def refuse_foreign(path: Path) -> None:
    """Only nothing, an empty folder, or a bundle and nothing beside it may be replaced.

    Raises:
        OutputError: something else is at `path`.
    """
    if not path.exists():
        return
    if path.is_dir() == (path.suffix == SUFFIX):
        kind, form = ("a folder", "one file") if path.is_dir() else ("a file", "a folder")
        raise OutputError(f"cannot write a bundle to {path}: it is {kind}, and that name asks for {form}")
    found = {item.name for item in path.iterdir()} if path.is_dir() else {path.name}
    if not found:
        return
    try:
        bundle = open_bundle(path)
    except BundleError as error:
        raise OutputError(f"cannot write a bundle to {path}: {error}; give another path") from error
    foreign = set() if bundle.packed else found - {MANIFEST, *bundle.manifest.files}
    if foreign := {name for name in foreign if not _LEFT_BEHIND.fullmatch(name)}:
        raise OutputError(f"cannot replace the bundle {path}: it also holds {', '.join(sorted(foreign))}")


def _weights(onnx: Path) -> tuple[str, ...]:
    """The files beside `onnx` that it keeps its weights in."""
    files = external_files(onnx.read_bytes()) if onnx.is_file() else ()
    if foreign := [file for file in files if not is_plain_name(file)]:
        raise BundleError(f"{onnx} keeps weights in {foreign[0]!a}, which is not beside it: export it again")
    return files


def _current(bundle: Bundle) -> Manifest:
    """The manifest as it stands now: another engine may have come in since `bundle` was opened."""
    manifest = open_bundle(bundle.path).manifest
    if manifest.files[ONNX] != bundle.manifest.files[ONNX]:
        raise BundleError(f"{bundle.path} was replaced by a bundle with another graph: begin again")
    return manifest


def _rewrite(bundle: Bundle, manifest: Manifest, new: Mapping[str, Source]) -> Bundle:
    """The bundle with another manifest and `new` files; those that the manifest no longer names go."""
    path = bundle.path
    _refuse_unreadable(manifest, path)
    if bundle.packed:
        _write_packed(path, manifest, {**open_bundle(path).places, **new})
        return open_bundle(path)
    for name, source in new.items():
        _write_file(path / name, source, manifest.files[name].sha256)
    _write_file(path / MANIFEST, Held(manifest.to_bytes()))
    for item in path.iterdir():
        if _LEFT_BEHIND.fullmatch(item.name) and item.name not in manifest.files:
            item.unlink(missing_ok=True)
    return open_bundle(path)


def _write_packed(path: Path, manifest: Manifest, sources: Mapping[str, Source]) -> None:
    with writing(path) as temporary, temporary.open("wb") as file:
        write_packed(file, manifest, sources)


def _write_folder(path: Path, manifest: Manifest, sources: Mapping[str, Source]) -> None:
    with appearing(path) as folder:
        for name, source in sources.items():
            _write_file(folder / name, source, manifest.files[name].sha256)
        _write_file(folder / MANIFEST, Held(manifest.to_bytes()))


def _write_file(path: Path, source: Source, expected: str = "") -> None:
    with writing(path) as temporary, temporary.open("wb") as file:
        copy(source, expected or sha256(source), file)


def _refuse_unreadable(manifest: Manifest, path: Path) -> None:
    """A manifest that nobody could read back is refused before it is written."""
    try:
        parse_manifest(manifest.to_bytes(), path / MANIFEST)
    except ValueError as error:  # a number that JSON does not have
        raise BundleError(f"{path / MANIFEST} cannot be written: {error}") from error


def _entry(kind: str, source: Source, info: EngineInfo | None) -> FileEntry:
    return FileEntry(kind, source.size, sha256(source), info)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One writer at a time, where the system has locks that go with the process."""
    folder = path if path.is_dir() else path.parent
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
