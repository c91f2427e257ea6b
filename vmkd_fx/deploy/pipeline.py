"""`deploy`: from a trained student to a bundle in one call."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from vmkd_fx.deploy.builder.options import BuildOptions
from vmkd_fx.deploy.bundle_write import refuse_foreign, write_bundle
from vmkd_fx.deploy.engine import build_engine, check_target, known_hazards
from vmkd_fx.deploy.inputs import ImageSource
from vmkd_fx.deploy.onnx_metadata import onnx_metadata
from vmkd_fx.deploy.precision.calibration import calibration_images
from vmkd_fx.deploy.precision.write import check_precision, write_in
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.errors import ModelError
from vmkd_fx.extras import require
from vmkd_fx.files import check_writable
from vmkd_fx.frames import Frames, parse_frames
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
    profile: Profile | Sequence[Profile] | None = None,
    options: BuildOptions | None = None,
    progress: bool = True,
    frames: str | Frames | None = None,
    precision: str = "fp32",
    calibrate: str | os.PathLike[str] | NDArray[Any] | Sequence[ImageSource] | None = None,
) -> Path:
    """Strip, lower, export, build and bundle; every step is checked and stands in the bundle's ledger.

    Args:
        model: a task, a traced module or a plain model; left as it was.
        out: the bundle's folder, or its file where that ends in ".vmkd"; an earlier bundle there is replaced
            once the new one is whole.
        target: "onnxruntime" for a bundle without an engine, else as in "tensorrt-rtx:sm86,sm89".
        predict: "class", "mean" or "dist", as for `vx.strip`.
        labels: names of the classes; by default their numbers.
        preprocess: how an image becomes the input; by default as the model says.
        precision: "fp32", "fp16", "bf16", "mixed", "int8" or "fp8" (`vmkd_fx.deploy.precision`). For an
            engine, what int8 and fp8 leave alone is in half.
        calibrate: a folder of pictures, or images as `Runner` takes them, on which ranges and errors are
            measured; int8 and fp8 need it.
        frames: the graph takes bytes, as for `vx.lower`, normalised as `preprocess` says where it is given.
        evaluate: module to accuracy on held-out images, for the ledger.
        dynamic_batch: any batch size, else one image at a time.
        profile: the batch sizes that the engine takes; several are several optimisation profiles.
        options: what else the builder is asked for, where the target takes an engine.

    Returns:
        The bundle's folder or file.

    Raises:
        VmkdError: whatever the step in question refuses; nothing is written then.
    """
    target = parse_target(target) if isinstance(target, str) else target
    if target.kind in ENGINE_KINDS:
        check_target(target, options)  # what is missing is said before any work is done
    require("torch", "train", "deploying a model")
    check_precision(precision, target.kind, calibrate)
    refuse_foreign(Path(out).resolve())
    check_writable(out)
    from vmkd_fx.passes.lowering import PORTABLE
    from vmkd_fx.passes.pipeline import lower

    asked = _asked(frames, preprocess)
    lowered = lower(model, str(target), passes=PORTABLE, predict=predict, evaluate=evaluate, frames=asked)
    preprocess = _preprocess(lowered, preprocess)
    names = _labels(lowered, labels)
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "model.onnx"
        metadata = onnx_metadata(lowered.info.name, preprocess, names, lowered.info.frames)
        images = None
        if calibrate is not None:
            images = calibration_images(calibrate, preprocess, lowered.info.frames)
        rest = "fp16" if target.kind in ENGINE_KINDS else "fp32"
        ledger, held = write_in(
            lowered, onnx, precision, images, rest=rest, dynamic_batch=dynamic_batch, metadata=metadata
        )
        engines = []
        if target.kind in ENGINE_KINDS:
            engine, info, step = build_engine(onnx, target, profile, progress, options, held)
            path = Path(folder) / "model.engine"
            path.write_bytes(engine)
            engines.append((path, info))
            ledger = ledger.add(step)
        return write_bundle(
            out,
            onnx=onnx,
            preprocess=preprocess,
            labels=names,
            ledger=ledger,
            name=lowered.info.name,
            engines=engines,
            precision=held.precision,
            kept=held.kept,
            frames=lowered.info.frames,
            hazards=known_hazards(onnx),
        )


def _labels(lowered: TracedModule, labels: Sequence[str]) -> tuple[str, ...]:
    from vmkd_fx.graph.shapes import class_count

    count = class_count(lowered, lowered.info.need_input_size())
    if labels and len(labels) != count:
        raise ModelError(f"{lowered.info.name} knows {count} classes, and {len(labels)} labels were given")
    return tuple(labels) or tuple(str(index) for index in range(count))


def _asked(frames: str | Frames | None, preprocess: Preprocess | None) -> Frames | None:
    """The frames, normalised as `preprocess` says where that is given and they name no mean and std."""
    if frames is None:
        return None
    frames = parse_frames(frames)
    if preprocess is None:
        return frames
    return replace(frames, mean=frames.mean or preprocess.mean, std=frames.std or preprocess.std)


def _preprocess(lowered: TracedModule, given: Preprocess | None) -> Preprocess:
    """As given or as the model says; where the graph itself normalises, with its mean and std."""
    info = lowered.info
    mean, std = (info.mean, info.std) if info.frames is None else (info.frames.mean, info.frames.std)
    assert mean is not None and std is not None  # of the frames of a lowered graph
    if given is None:
        size = info.need_input_size()
        return Preprocess(size, mean, std, info.interpolation, info.crop_pct, info.crop_mode)
    if info.frames is not None and (given.mean, given.std) != (mean, std):
        raise ModelError(
            f"{info.name} normalises its frames with mean {mean} and std {std}, and preprocess= says mean "
            f"{given.mean} and std {given.std}: give one of the two"
        )
    return given
