"""What a bundle says about itself: `manifest.json`, read with suspicion.

A bundle may come from anywhere, so every value is checked for its type and range before anything uses it, and
a file name is a plain name that cannot lead out of the bundle.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from vmkd_fx.deploy.decode import decode
from vmkd_fx.deploy.precision.asked import PRECISIONS
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.deploy.seal import seal, unseal
from vmkd_fx.errors import BundleError, DataError, VmkdError
from vmkd_fx.frames import Frames
from vmkd_fx.steps import Ledger
from vmkd_fx.target import ENGINE_KINDS, Profile, Target

FORMAT = 1
MANIFEST = "manifest.json"
ONNX = "model.onnx"
LARGEST_MANIFEST = 16 * 2**20
LARGEST_ONNX = 2**31 - 1  # a Protocol Buffers message ends here; larger graphs have their weights beside them

KINDS = ("onnx", "weights", "engine", "cache")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class EngineInfo:
    """What an engine was built for and by.

    Attributes:
        target: its kind and the compute capabilities it runs on; never empty.
        profiles: the batch sizes it takes, one a profile, in the engine's own order.
        built_with: package and version, as in "TensorRT-RTX 1.7.1.116". No other version loads it.
        options: what else it was built with, in words, as in {"refittable": "yes"}.
    """

    target: Target
    profiles: tuple[Profile, ...]
    built_with: str
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind, sms = self.target.kind, self.target.compute_capabilities
        if kind not in ENGINE_KINDS:
            raise DataError(f"an engine for {kind!r}: it is not one of {', '.join(ENGINE_KINDS)}")
        if not sms or not all(10 <= sm < 1000 for sm in sms):
            raise DataError(f"an engine for the compute capabilities {list(sms)}: as in [86, 89]")
        if not self.profiles:
            raise DataError("an engine without an optimisation profile")

    @property
    def suffix(self) -> str:
        """Of the engine's file name, as in "tensorrt-rtx-sm86-sm89.engine"."""
        return (
            "-".join((self.target.kind, *(f"sm{sm}" for sm in self.target.compute_capabilities))) + ".engine"
        )


@dataclass(frozen=True)
class FileEntry:
    """A file of a bundle.

    Attributes:
        kind: one of `KINDS`; "weights" is ONNX external data, "cache" what an engine's package keeps.
        bytes: its size.
        sha256: of its contents, hexadecimal.
        engine: for an engine what it was built for, else None.
    """

    kind: str
    bytes: int
    sha256: str
    engine: EngineInfo | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"a file of the kind {self.kind!r}: it is not one of {', '.join(KINDS)}")
        if self.bytes < 0 or not _SHA256.fullmatch(self.sha256):
            raise DataError("a file whose 'bytes' or 'sha256' is not one")
        if (self.kind == "engine") != (self.engine is not None):
            raise DataError("an engine, and nothing else, says what it was built for")


@dataclass(frozen=True)
class Hazard:
    """A known defect of a package that this graph could meet.

    Attributes:
        name: of the hazard, as in "groupnorm-of-one-group".
        package: as in "TensorRT".
        versions: those that have it, in words.
        what: goes wrong.
        reference: where it is known from.
        nodes: of the ONNX graph that would meet it.
        answer: what was done about it, in words.
    """

    name: str
    package: str
    versions: str
    what: str
    reference: str
    nodes: tuple[str, ...] = ()
    answer: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two hops of the way, run on the same images.

    Attributes:
        before, after: what was compared, as in "torch" and "model.onnx".
        images: how many.
        error: largest absolute difference over the largest absolute logit.
        tolerance: the bound it was held to.
        agreement: part of the images with the same first class, 0..1; None where there is one class only.
        detail: how it was run, in words.
    """

    before: str
    after: str
    images: int
    error: float
    tolerance: float
    agreement: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Verified:
    """The sign of a verification: what was compared, with what, and which files that holds for.

    Attributes:
        files: SHA-256 by name of the files that took part. A file that changed since is not covered.
        comparisons: in the order of the hops.
        versions: of the packages that ran them.
    """

    files: dict[str, str]
    comparisons: tuple[Comparison, ...]
    versions: dict[str, str] = field(default_factory=dict)


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
        precision: that the graph was asked to have, one of `PRECISIONS`.
        kept: names of the matrix products in the graph that are spared it on purpose.
        frames: what the graph takes instead of normalised images; None for those.
        hazards: known defects that engines of this graph could meet.
        verified: the sign of the last verification, or None.
    """

    name: str
    files: dict[str, FileEntry]
    preprocess: Preprocess
    labels: tuple[str, ...]
    ledger: Ledger
    created_with: dict[str, str] = field(default_factory=dict)
    precision: str = "fp32"
    kept: tuple[str, ...] = ()
    frames: Frames | None = None
    hazards: tuple[Hazard, ...] = ()
    verified: Verified | None = None

    def __post_init__(self) -> None:
        for name in self.files:
            if not is_plain_name(name):
                raise DataError(f"{name!r} is not a plain file name")
        kinds = {name: entry.kind for name, entry in self.files.items()}
        if [name for name, kind in kinds.items() if kind == "onnx"] != [ONNX]:
            raise DataError(f"'files' holds no {ONNX}, or another graph")
        if len({name.lower() for name in self.files}) < len(self.files):
            raise DataError("two files differ in nothing but small and capital letters")
        if self.precision not in PRECISIONS:
            raise DataError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the files with the graph's external data."""
        return tuple(sorted(name for name, entry in self.files.items() if entry.kind == "weights"))

    @property
    def covered(self) -> bool:
        """Whether the sign of the verification holds for every file as it is now."""
        now = {name: entry.sha256 for name, entry in self.files.items() if entry.kind != "cache"}
        return self.verified is not None and now.items() <= self.verified.files.items()

    def to_bytes(self) -> bytes:
        """Sealed JSON; equal manifests give equal bytes."""
        data: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        data["files"] = dict(sorted(data["files"].items()))
        return seal(data)


def is_plain_name(name: str) -> bool:
    """Whether a file of a bundle may have this name: it leads nowhere, on any system."""
    return _PLAIN_NAME.fullmatch(name) is not None and name != MANIFEST


def parse_manifest(raw: bytes, path: object) -> Manifest:
    """The manifest in `raw`; the files it lists are not looked at.

    Args:
        path: of the manifest, for messages.

    Raises:
        BundleError: it was changed, or says something that it may not say.
    """
    if len(raw) > LARGEST_MANIFEST:
        raise BundleError(f"{path} is larger than the {LARGEST_MANIFEST:,} bytes that a manifest may have")
    try:
        data = unseal(raw)
        version = data.pop("format", None)
        if type(version) is not int or version != FORMAT:
            raise DataError(f"found format {version}, this version of vmkd-fx reads format {FORMAT}")
        return decode(Manifest, data, "the manifest")
    except VmkdError as error:
        raise BundleError(f"{path}: {error}") from error
