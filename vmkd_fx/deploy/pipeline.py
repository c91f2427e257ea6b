"""`deploy`: from a trained student to a bundle in one call."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmkd_fx.deploy.bundle import refuse_foreign, write_bundle
from vmkd_fx.deploy.engine import build_engine
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.deploy.tensorrt import package
from vmkd_fx.errors import ModelError
from vmkd_fx.extras import require
from vmkd_fx.target import ENGINE_KINDS, Profile, Target, parse_target

if TYPE_CHECKING:
    from torch import nn

    from vmkd_fx.graph.traced import TracedModule


def deploy(
    model: Any,
    out: str | os.PathLike[str],
    *,
    target: str | Target = "onnxruntime",
    predict: str = "class",
    labels: Sequence[str] = (),
    preprocess: Preprocess | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    dynamic_batch: bool = True,
    profile: Profile | None = None,
    progress: bool = True,
) -> Path:
    """Strip, lower, export, build and bundle; every step is checked and stands in the bundle's ledger.

    Args:
        model: a task, a traced module or a plain model; left as it was.
        out: the bundle's folder; an earlier bundle there is replaced once the new one is whole.
        target: "onnxruntime" for a bundle without an engine, else as in "tensorrt-rtx:sm86,sm89".
        predict: "class", "mean" or "dist", as for `vx.strip`.
        labels: names of the classes; by default their numbers.
        preprocess: how an image becomes the input; by default as the model says.
        evaluate: module to accuracy on held-out images, for the ledger.
        dynamic_batch: any batch size, else one image at a time.
        profile: the batch sizes that the engine takes.

    Returns:
        The bundle's folder.

    Raises:
        VmkdError: whatever the step in question refuses; nothing is written then.
    """
    target = parse_target(target) if isinstance(target, str) else target
    if target.kind in ENGINE_KINDS:
        package(target.kind)  # a missing one is said before any work is done
    require("torch", "train", "deploying a model")
    refuse_foreign(Path(out).resolve())
    from vmkd_fx.passes.pipeline import lower

    lowered = lower(model, str(target), predict=predict, evaluate=evaluate)
    names = _labels(lowered, labels)
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "model.onnx"
        ledger = lowered.ledger.add(export(lowered, onnx, dynamic_batch=dynamic_batch))
        engines = []
        if target.kind in ENGINE_KINDS:
            engine, info, step = build_engine(onnx, target, profile, progress)
            path = Path(folder) / "model.engine"
            path.write_bytes(engine)
            engines.append((path, info))
            ledger = ledger.add(step)
        return write_bundle(
            out,
            onnx=onnx,
            preprocess=preprocess or _preprocess(lowered),
            labels=names,
            ledger=ledger,
            name=lowered.info.name,
            engines=engines,
        )


def _labels(lowered: TracedModule, labels: Sequence[str]) -> tuple[str, ...]:
    from vmkd_fx.graph.shapes import class_count

    count = class_count(lowered, lowered.info.need_input_size())
    if labels and len(labels) != count:
        raise ModelError(f"{lowered.info.name} knows {count} classes, and {len(labels)} labels were given")
    return tuple(labels) or tuple(str(index) for index in range(count))


def _preprocess(lowered: TracedModule) -> Preprocess:
    info = lowered.info
    return Preprocess(
        input_size=info.need_input_size(),
        mean=info.mean,
        std=info.std,
        interpolation=info.interpolation,
        crop_pct=info.crop_pct,
    )
