"""What a bundle says about itself: `manifest.json`, read with suspicion.

A bundle may come from anywhere, so every value is checked for its type and range before anything uses it, and
a file name is a plain name that cannot lead out of the folder.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.errors import BuildError, BundleError, DataError
from vmkd_fx.steps import Ledger
from vmkd_fx.target import ENGINE_KINDS, Profile, Target

FORMAT = 1
MANIFEST = "manifest.json"
ONNX = "model.onnx"
LARGEST_MANIFEST = 16 * 2**20

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class EngineInfo:
    """What an engine was built for and by.

    Attributes:
        target: its kind and the compute capabilities it runs on; never empty.
        profile: the batch sizes it takes.
        built_with: package and version, as in "TensorRT-RTX 1.7.1.116". No other version loads it.
    """

    target: Target
    profile: Profile
    built_with: str

    @property
    def suffix(self) -> str:
        """Of the engine's file name, as in "tensorrt-rtx-sm86-sm89.engine"."""
        return (
            "-".join((self.target.kind, *(f"sm{sm}" for sm in self.target.compute_capabilities))) + ".engine"
        )


@dataclass(frozen=True)
class FileEntry:
    """A file of a bundle: its size and hash and, for an engine, what it was built for."""

    name: str
    bytes: int
    sha256: str
    engine: EngineInfo | None = None


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        name: of the model.
        files: by file name; `model.onnx` is always among them.
        preprocess: from an image to the model's input.
        labels: of the classes in order; may be empty.
        ledger: how the model came about.
        created_with: package versions.
    """

    name: str
    files: dict[str, FileEntry]
    preprocess: Preprocess
    labels: tuple[str, ...]
    ledger: Ledger
    created_with: dict[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """JSON; equal manifests give equal text."""
        data = {
            "format": FORMAT,
            "name": self.name,
            "created_with": self.created_with,
            "files": {name: _entry_to_json(entry) for name, entry in sorted(self.files.items())},
            "preprocess": self.preprocess.to_json(),
            "labels": list(self.labels),
            "ledger": self.ledger.to_json(),
        }
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json` of `folder`; the files it lists are not looked at.

    Raises:
        BundleError: there is none, or it says something that it may not say.
    """
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it holds no file {MANIFEST}")
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_MANIFEST + 1)
        if len(text) > LARGEST_MANIFEST:
            raise BundleError(
                f"{path} is larger than the {LARGEST_MANIFEST:,} bytes that a manifest may have"
            )
        return _manifest(json.loads(text, parse_constant=_refuse_constant))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from error
    except (_ManifestError, DataError, BuildError) as error:
        raise BundleError(f"{path}: {error}") from error


class _ManifestError(Exception):
    """What is wrong in a manifest; the path is added by the caller."""


def _manifest(data: Any) -> Manifest:
    version = _get(data, "format", int)
    if version != FORMAT:
        raise _ManifestError(f"format {version} was asked for, this version of vmkd-fx reads format {FORMAT}")
    files = {name: _entry(name, entry) for name, entry in _get(data, "files", dict).items()}
    if ONNX not in files or files[ONNX].engine is not None:
        raise _ManifestError(f"'files' holds no {ONNX}")
    versions = _get(data, "created_with", dict)
    if not all(isinstance(version, str) for version in versions.values()):
        raise _ManifestError("'created_with' must hold version strings")
    return Manifest(
        name=_get(data, "name", str),
        files=files,
        preprocess=Preprocess.from_json(_get(data, "preprocess", dict)),
        labels=tuple(_list(data, "labels", str)),
        ledger=_ledger(_get(data, "ledger", dict)),
        created_with=versions,
    )


def _ledger(data: Any) -> Ledger:
    try:
        ledger = Ledger.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _ManifestError(f"'ledger' cannot be read: {error!r}") from error
    for step in ledger.steps:
        words = (step.name, step.detail, step.checked, *(w for r in step.refused for w in (r.node, r.reason)))
        counts = (step.matched, step.nodes, step.parameters, step.multiply_adds)
        if not (
            all(isinstance(word, str) for word in words)
            and all(count is None or isinstance(count, int) for count in counts)
            and all(value is None or isinstance(value, int | float) for value in (step.error, step.tolerance))
        ):
            raise _ManifestError(f"'ledger': step {step.name!r} holds a value of the wrong type")
    if not all(isinstance(value, int | float) for value in ledger.accuracy.values()):
        raise _ManifestError("'ledger': an accuracy is no number")
    return ledger


def _entry(name: str, data: Any) -> FileEntry:
    if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST:
        raise _ManifestError(f"{name!r} is not a plain file name")
    kind, size, digest = _get(data, "kind", str), _get(data, "bytes", int), _get(data, "sha256", str)
    if size < 0 or not re.fullmatch("[0-9a-f]{64}", digest):
        raise _ManifestError(f"{name}: 'bytes' or 'sha256' is not one")
    if kind == "onnx":
        return FileEntry(name, size, digest)
    if kind != "engine":
        raise _ManifestError(f"{name}: kind {kind!r} is neither 'onnx' nor 'engine'")
    runtime, sms, profile = _get(data, "runtime", str), _list(data, "sm", int), _list(data, "profile", int)
    if runtime not in ENGINE_KINDS:
        raise _ManifestError(f"{name}: runtime {runtime!r} is not one of {', '.join(ENGINE_KINDS)}")
    if not sms or len(profile) != 3:
        raise _ManifestError(f"{name}: 'sm' must hold compute capabilities and 'profile' three batch sizes")
    info = EngineInfo(Target(runtime, tuple(sms)), Profile(*profile), _get(data, "built_with", str))
    return FileEntry(name, size, digest, info)


def _entry_to_json(entry: FileEntry) -> dict[str, Any]:
    common = {"bytes": entry.bytes, "sha256": entry.sha256}
    if entry.engine is None:
        return {"kind": "onnx", **common}
    target, profile = entry.engine.target, entry.engine.profile
    return {
        "kind": "engine",
        **common,
        "runtime": target.kind,
        "sm": list(target.compute_capabilities),
        "profile": [profile.smallest, profile.best, profile.largest],
        "built_with": entry.engine.built_with,
    }


def _get(data: Any, key: str, kind: type[_T]) -> _T:
    if not isinstance(data, dict) or key not in data:
        raise _ManifestError(f"{key!r} is missing")
    if type(data[key]) is not kind:
        raise _ManifestError(f"{key!r} must be {kind.__name__}, found {type(data[key]).__name__}")
    return data[key]


def _list(data: Any, key: str, kind: type[_T]) -> list[_T]:
    values = _get(data, key, list)
    if not all(type(value) is kind for value in values):
        raise _ManifestError(f"{key!r} must be a list of {kind.__name__}")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
