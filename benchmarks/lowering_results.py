"""Figures that outlive the run: a JSON file a model, with a stamp of what it was measured on."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from lowering_measure import Figures, Settings, measure

import vmkd_fx
from vmkd_fx.files import write_text

PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxslim", "onnxruntime", "tensorrt-rtx-cu13")
_LOWERING = ("graph", "models", "passes", "deploy", "target.py")
_MEASURING = ("models", "chains", "counts", "latency", "runtime", "measure")

Stamp = dict[str, Any]


def stamp(settings: Settings) -> Stamp:
    """All that a figure depends on besides the model: the code, the packages, the machine, the settings."""
    return {
        "code": _code(),
        "versions": versions(),
        "machine": machine(),
        "settings": asdict(settings),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that take part, and are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def stored(folder: Path, name: str, wanted: Stamp) -> Figures | None:
    """What was measured before under the same stamp."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return Figures.from_json(found["figures"]) if found["stamp"] == wanted else None


def measured(folder: Path, name: str, settings: Settings, wanted: Stamp) -> Figures:
    """Measure a model in a process of its own, whose memory ends with it, and store what it found.

    A process that ended without a word is a reason in the figures, and is not stored.
    """
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    process = context.Process(target=_store, args=(path, name, settings, wanted), daemon=True)
    process.start()
    try:
        process.join()
    finally:
        if process.is_alive():
            process.terminate()
    found = stored(folder, name, wanted)
    reason = f"its process ended with code {process.exitcode}; below zero a signal ended it, as 9 for memory"
    return found or Figures(name, failed={"both": reason})


def _store(path: Path, name: str, settings: Settings, wanted: Stamp) -> None:
    figures = measure(name, settings).to_json()
    write_text(path, json.dumps({"stamp": wanted, "figures": figures}, indent=1) + "\n")


def _code() -> str:
    """A digest of the sources that make the figures."""
    package, here = Path(vmkd_fx.__file__).parent, Path(__file__).parent
    files = [here / f"lowering_{name}.py" for name in _MEASURING]
    for part in _LOWERING:
        files += sorted((package / part).rglob("*.py")) if (package / part).is_dir() else [package / part]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
