"""`verify`: every hop of a bundle again, from the trained model to the device, and the sign for it.

    torch -> model.onnx in ONNX Runtime -> engine

A hop that cannot be run here is named with the reason. What was signed elsewhere for the same files stays:
the graph is compared where the checkpoint is, an engine where its GPU is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.deploy.bundle import Bundle, read_bundle
from vmkd_fx.deploy.bundle_write import record_verified
from vmkd_fx.deploy.gpu import find_gpu
from vmkd_fx.deploy.inputs import ImageSource
from vmkd_fx.deploy.manifest import ONNX, Comparison, EngineInfo, Verified
from vmkd_fx.deploy.onnx_export import random_images, rounding_bound
from vmkd_fx.deploy.precision.agreement import compared
from vmkd_fx.deploy.precision.calibration import calibration_images
from vmkd_fx.deploy.verify_hops import (
    engine_reason,
    graph_layers,
    in_engine,
    in_onnxruntime,
    in_torch,
    parsed_layers,
    torch_images,
)
from vmkd_fx.deploy.verify_report import BOUNDS, Hop, Verification, fault_of
from vmkd_fx.deploy.versions import versions
from vmkd_fx.errors import MissingExtraError, ModelError, VmkdError
from vmkd_fx.extras import require

RANDOM = 16
MOST = 256
TORCH = "torch"

_NEED_PICTURES = ("int8", "fp8")

Images: TypeAlias = "str | os.PathLike[str] | NDArray[Any] | Sequence[ImageSource]"


def verify(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    images: Images | None = None,
    predict: str = "class",
) -> Verification:
    """Run every hop of a bundle again and sign for it in the bundle's manifest.

    Args:
        path: of the bundle.
        model: what it was made of: a task, a traced module or a plain model; without it the hop from torch
            is not run.
        images: a folder of pictures, or images as `Runner` takes them, at most `MOST`, evenly taken; without
            them `RANDOM` random ones.
        predict: as the bundle was deployed.

    Returns:
        What was found; print it for a table.

    Raises:
        VerificationError: a hop does not hold, or none could be run; nothing is signed then.
        VmkdError: the bundle is damaged, the model is another one, or an image cannot be read.
    """
    found = examine(path, model=model, images=images, predict=predict)
    sign_off(found)
    return found


def examine(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    images: Images | None = None,
    predict: str = "class",
) -> Verification:
    """What `verify` finds, whether it holds or not; nothing is signed."""
    bundle = read_bundle(path)
    batch, words = _images(bundle, images)
    given = images is not None
    hops = [_from_torch(bundle, model, predict, batch, given)]
    for name, info in bundle.engines.items():
        hops.append(_to_engine(bundle, name, info, batch, given))
    hops += _read_back(bundle)
    return Verification(bundle, words, tuple(hops))


def sign_off(found: Verification) -> Bundle:
    """Write the sign into the manifest of the bundle, and return the bundle with it.

    What was signed before for hops that were not run this time stays, if their files are the same.

    Raises:
        VerificationError: a hop does not hold, or no numbers were compared.
        OutputError: the bundle cannot be written to.
    """
    found.check()
    return record_verified(found.bundle, _sign(found))


def _sign(found: Verification) -> Verified:
    manifest = found.bundle.manifest
    now = {name: entry.sha256 for name, entry in manifest.files.items()}
    fresh = [
        Comparison(
            hop.before,
            hop.after,
            hop.images,
            hop.error,
            hop.bound,
            hop.agreement,
            f"{hop.how}; {found.images}",
        )
        for hop in found.compared
        if hop.error is not None and hop.bound is not None
    ]
    graph = (ONNX, *manifest.weights)
    former, kept = manifest.verified, []
    if former is not None and all(former.files.get(name) == now[name] for name in graph):
        ran = {(comparison.before, comparison.after) for comparison in fresh}
        kept = [
            comparison
            for comparison in former.comparisons
            if (comparison.before, comparison.after) not in ran
            and former.files.get(comparison.after) == now.get(comparison.after, "")
        ]
    comparisons = tuple(sorted([*fresh, *kept], key=lambda c: (c.before != TORCH, c.after)))
    files = {name: now[name] for name in sorted({*graph, *(c.after for c in comparisons)})}
    earlier = former.versions if former is not None and kept else {}
    return Verified(files, comparisons, {**earlier, **versions()})


def _images(bundle: Bundle, images: Images | None) -> tuple[NDArray[Any], str]:
    """What the graph takes, and which images these are, in words."""
    manifest = bundle.manifest
    size = manifest.preprocess.input_size
    if images is None:
        shape = size if manifest.frames is None else manifest.frames.shape(size)
        batch = random_images(manifest.frames is not None, (RANDOM, *shape))
        return batch, f"{RANDOM} random images"
    batch = calibration_images(
        images, manifest.preprocess, manifest.frames, most=MOST, purpose="verification"
    )
    return batch, f"{len(batch)} given images"


def _from_torch(bundle: Bundle, model: Any, predict: str, images: NDArray[Any], given: bool) -> Hop:
    """The model that was trained, in float32, against the graph."""
    precision = bundle.manifest.precision
    layers = graph_layers(bundle)

    def left_out(why: str) -> Hop:
        return Hop(TORCH, ONNX, why, ran=False, layers=layers)

    if model is None:
        return left_out("the model was not given (vmkd verify BUNDLE CHECKPOINT)")
    if precision in _NEED_PICTURES and not given:
        return left_out(
            f"{precision} was calibrated on pictures, and random images say nothing of it (--images FOLDER)"
        )
    torch = require("torch", "train", "running the model")
    from vmkd_fx.passes.pipeline import strip

    module = strip(model, predict)
    expected = in_torch(module, images, bundle)
    try:
        logits, how = in_onnxruntime(bundle, images)
    except MissingExtraError as error:
        return left_out(str(error))
    if logits.shape != expected.shape:
        raise ModelError(
            f"{module.info.name} gives {expected.shape[1]} logits, the bundle {bundle.path} "
            f"{logits.shape[1]}: it was made of another model"
        )
    bound, words = BOUNDS[precision].graph, ""
    if precision == "fp32" and not compared(logits, expected)[0] <= bound:
        taken = torch_images(module, images[:2], bundle).cpu().numpy()
        bound, words = rounding_bound(module, [taken], bound)
    how = f"torch {torch.__version__} as it was trained, {how}{words}"
    return _judged(TORCH, ONNX, how, (logits, expected), bound, _least(bundle, given), layers)


def _to_engine(bundle: Bundle, name: str, info: EngineInfo, images: NDArray[Any], given: bool) -> Hop:
    """The graph in ONNX Runtime against an engine, where its GPU and its package are."""
    gpu = find_gpu()
    try:
        reason = engine_reason(info, gpu.compute_capability, gpu.why)
        if reason:
            return Hop(ONNX, name, reason, ran=False)
        expected, reference = in_onnxruntime(bundle, images)
    except MissingExtraError as error:
        return Hop(ONNX, name, str(error), ran=False)
    try:
        logits, how = in_engine(bundle, name, info, images)
    except VmkdError as error:
        return Hop(ONNX, name, f"sm{gpu.compute_capability}", fault=str(error))
    how = f"{reference}, {how} on sm{gpu.compute_capability}"
    bound = BOUNDS[bundle.manifest.precision].engine
    return _judged(ONNX, name, how, (logits, expected), bound, _least(bundle, given))


def _read_back(bundle: Bundle) -> Iterator[Hop]:
    """What the packages of the bundle's engines make of the graph, without a GPU."""
    for kind in sorted({info.target.kind for info in bundle.engines.values()}):
        try:
            layers, how = parsed_layers(bundle, kind)
        except MissingExtraError as error:
            yield Hop(ONNX, f"{kind} parser", str(error), ran=False)
        except VmkdError as error:
            yield Hop(ONNX, f"{kind} parser", "parsed", fault=str(error))
        else:
            yield Hop(ONNX, f"{kind} parser", how, layers=layers)


def _least(bundle: Bundle, given: bool) -> float | None:
    return BOUNDS[bundle.manifest.precision].agreement if given else None


def _judged(
    before: str,
    after: str,
    how: str,
    logits: tuple[NDArray[np.float32], NDArray[np.float32]],
    bound: float,
    least: float | None,
    layers: dict[str, int] | None = None,
) -> Hop:
    """The hop with its figures, held to its bounds.

    Args:
        logits: of `after` and of `before`, (B, classes).
    """
    found, expected = logits
    error, agreement = compared(found, expected)
    one_class = expected.shape[1] == 1
    shown, least = (None, None) if one_class else (agreement, least)
    if not expected.any():
        how += " (every logit is 0, which proves little)"
    return Hop(
        before,
        after,
        how,
        images=len(expected),
        error=error,
        bound=bound,
        agreement=shown,
        least=least,
        layers=layers or {},
        fault=fault_of(len(expected), error, bound, shown, least),
    )
