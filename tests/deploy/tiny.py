"""A bundle of a few thousand bytes, for tests that touch every one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.bundle_write import add_engine, write_bundle
from vmkd_fx.deploy.manifest import EngineInfo
from vmkd_fx.deploy.packed import header
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.deploy.runtime import load
from vmkd_fx.deploy.seal import seal_text, unseal
from vmkd_fx.errors import BundleError
from vmkd_fx.steps import Ledger, Refusal, Site, Step
from vmkd_fx.target import Profile, Target

FORMS = ("bundle", "bundle.vmkd")
TEN_GB = 10 * 10**9
INFO = EngineInfo(Target("tensorrt-rtx", (86, 89)), (Profile(1, 2, 4),), "TensorRT-RTX 1.7.1.116")
ENGINE = "model.tensorrt-rtx-sm86-sm89.engine"
STEP = Step("engine", f"{INFO.target}; first", checked="built, not run")
PREPROCESS = Preprocess((3, 2, 2), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop_pct=1.0)
LABELS = ("cat", "dög")
LEDGER = Ledger(
    (Step("views", "1 chain", 1, (Site("a", "b"),), (Refusal("c", "d"),), 3, 4, 5, 1e-16, 1e-12, "float64"),),
    {"class": 0.5},
)


def tiny_graph() -> onnx.ModelProto:
    """Logits (B, 2) of images (B, 3, 2, 2): one matrix product, with weights of 96 bytes."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> tiny (float[b, 3, 2, 2] images) => (float[b, 2] logits)'
        "{ flat = Flatten(images)  logits = MatMul(flat, weight) }"
    )
    weight = np.random.default_rng(0).standard_normal((12, 2), dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    return model


def tiny_bundle(path: Path, *, engine: bool = True) -> Path:
    """The graph, its labels and, if asked for, an "engine" that nothing can load."""
    source = path.with_name(f"{path.name} source.onnx")
    onnx.save(tiny_graph(), source)
    write_bundle(path, onnx=source, preprocess=PREPROCESS, labels=LABELS, ledger=LEDGER, name="tiny")
    source.unlink()
    if engine:
        add_engine(read_bundle(path), b"an engine", INFO, STEP)
    return path


def edit_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    """Change what the manifest says, and seal it again as an attacker would."""
    path = folder / "manifest.json"
    data = unseal(path.read_bytes())
    change(data)
    path.write_bytes(reseal(data))


def reseal(data: dict[str, Any]) -> bytes:
    """`seal`, for values too that vmkd-fx would not write."""
    return seal_text(json.dumps({"sha256": "", **data}, indent=1) + "\n")


def repack(path: Path, *members: tuple[str, bytes]) -> Path:
    """A packed bundle of these members, made by hand."""
    path.write_bytes(b"".join(member(*item) for item in members) + bytes(1024))
    return path


def member(name: str, data: bytes, size: int | None = None) -> bytes:
    """A file as it stands in an archive, whose header may say another size."""
    return header(name, len(data) if size is None else size) + data + bytes(-len(data) % 512)


def refuses(bundle: Path, reason: str) -> None:
    """Whoever checks or runs `bundle` is told the reason."""
    for read in (read_bundle, load):
        with pytest.raises(BundleError, match=reason):
            read(bundle)
