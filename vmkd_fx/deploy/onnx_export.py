"""From a torch model to an ONNX file that ONNX Runtime has run and found equal.

The graph keeps names and module paths, but no source paths and no line numbers: the same model gives the same
bytes, wherever its source lies. An example batch of two is what keeps the batch dynamic: with one, many
models come out static without a word.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx import __version__
from vmkd_fx.deploy.manifest import LARGEST_ONNX
from vmkd_fx.deploy.onnx_file import first_line, run_onnx, write_onnx
from vmkd_fx.deploy.onnx_operators import translations
from vmkd_fx.errors import ExportError
from vmkd_fx.extras import require
from vmkd_fx.files import drafting
from vmkd_fx.steps import Step

if TYPE_CHECKING:
    import torch
    from onnx import ModelProto

OLDEST_OPSET = 18
_ROUNDINGS, _LOOSEST = 10, 1e-3

Array = NDArray[np.float32]


def export(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    opset: int = 20,
    input_size: tuple[int, int, int] | None = None,
    tolerance: float = 1e-5,
    metadata: Mapping[str, str] | None = None,
    largest: int = LARGEST_ONNX,
) -> Step:
    """Write `model` to `path` as ONNX and check it there.

    The graph takes `images`, float32 (B, C, H, W) or the frames that the model was lowered for, and gives
    `logits`, float32 (B, classes).

    Args:
        model: returns one tensor of logits. Exported as in eval(); its own mode is not changed.
        path: the ONNX file. It appears only when every check has passed, and with it, where the model is too
            large for one file, a second one of that name and ".data", which holds the weights.
        dynamic_batch: any batch size (checked with 1, 2 and 3), else one image at a time.
        opset: of the ONNX standard; 18 or later.
        input_size: (C, H, W); default: what the model says.
        tolerance: bound on the largest difference between ONNX Runtime and `model` over the largest logit. A
            model that breaks it is held to ten times what one unit in the last place of every weight does to
            its own logits, if that is more, and to 1e-3 at most; the row of the ledger says so.
        metadata: properties that the file is to carry.
        largest: bytes of the file from which on the weights lie beside it; ONNX itself ends at 2 GiB.

    Raises:
        ExportError: the model returns something else than logits, cannot be exported, keeps a fixed batch in
            spite of `dynamic_batch`, or ONNX Runtime computes something else.
        OutputError: `path` cannot be written.
        MissingExtraError: the extra `train` is not installed.
    """
    require("torch", "train", "exporting to ONNX")
    onnx = require("onnx", "train", "exporting to ONNX")
    require("onnxscript", "train", "exporting to ONNX")
    require("onnxruntime", "train", "checking an exported model")
    if not OLDEST_OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise ExportError(
            f"opset {opset}: the exporter writes {OLDEST_OPSET} to {onnx.defs.onnx_opset_version()}"
        )
    shape, frames = _input(model, input_size)
    batches = (1, 2, 3) if dynamic_batch else (1,)
    images = [random_images(frames, (batch, *shape)) for batch in batches]
    with _evaluating(model):
        judge, widen = _judge(model)
        logits = [_run(judge, batch) for batch in images]
        proto = _to_onnx(model, images[1 if dynamic_batch else 0], opset, dynamic_batch)
    if dynamic_batch:
        _refuse_static(proto)
    for key, value in sorted((metadata or {}).items()):
        proto.metadata_props.add(key=key, value=value)
    with drafting(path) as folder:
        draft = folder / Path(path).name
        wide = None if widen is None else widen(proto)
        size = write_onnx(proto, draft, largest)
        error = relative_error(run_onnx(draft, images, wide), logits)
        allowed, measured = tolerance, ""
        if not error <= tolerance:
            allowed, measured = rounding_bound(judge, images, tolerance)
        if not error <= allowed:
            raise ExportError(
                f"ONNX Runtime differs from the model by {error:.1e} (relative), more than the {allowed:.0e} "
                "allowed: the exporter translated an operator wrongly, or the model is not in float32"
            )
    return Step(
        name="onnx",
        detail=f"opset {opset}, {'dynamic batch' if dynamic_batch else 'batch 1'}, {size}",
        nodes=len(proto.graph.node),
        error=error,
        tolerance=allowed,
        checked=("ONNX Runtime, " if widen is None else "ONNX Runtime, its half widened to float32, ")
        + ("batches 1, 2, 3" if dynamic_batch else "batch 1")
        + measured
        + ("" if any(batch.any() for batch in logits) else " (every logit is 0, which proves little)"),
    )


def _judge(model: torch.nn.Module) -> tuple[torch.nn.Module, Callable[[ModelProto], ModelProto] | None]:
    """What the file is compared with, and what the file itself goes through before, where it is in half."""
    from vmkd_fx.deploy.precision.widen import in_half_precision, widened_file, widened_module
    from vmkd_fx.graph.traced import TracedModule

    if isinstance(model, TracedModule) and in_half_precision(model):
        return widened_module(model), widened_file
    return model, None


def rounding_bound(model: torch.nn.Module, images: list[NDArray[Any]], tolerance: float) -> tuple[float, str]:
    """The bound for a model that magnifies rounding, and where it comes from, in words.

    Args:
        images: as the model takes them.
        tolerance: of a model that does not.
    """
    from vmkd_fx.graph.verify import rounding_of

    rounding = max(rounding_of(model, _tensor(model, batch)) for batch in images)
    words = f"; the last bit of every weight makes {rounding:.1e}, {_ROUNDINGS} times that is allowed"
    return max(tolerance, min(_ROUNDINGS * rounding, _LOOSEST)), words


def relative_error(found: list[Array], expected: list[Array]) -> float:
    """The largest absolute difference over the largest absolute expected value; NaN when either holds one."""
    difference = max(float(np.abs(f - e).max()) for f, e in zip(found, expected, strict=True))
    scale = max(float(np.abs(e).max()) for e in expected)
    return difference / scale if scale else difference


def random_images(frames: bool, shape: tuple[int, ...], seed: int = 0) -> NDArray[Any]:
    """Normal float32 numbers, or bytes for a graph that takes frames."""
    random = np.random.default_rng(seed)
    if frames:
        return random.integers(0, 256, shape, dtype=np.uint8)
    return random.standard_normal(shape, dtype=np.float32)


def _input(model: torch.nn.Module, given: tuple[int, int, int] | None) -> tuple[tuple[int, ...], bool]:
    """The shape of one image as the model takes it, and whether it takes frames."""
    from vmkd_fx.graph.info import model_info

    info = model_info(model, given)
    if info.input_size is None:
        raise ExportError(f"{type(model).__name__} does not say its input size: pass input_size=(C, H, W)")
    if info.frames is None:
        return info.input_size, False
    return info.frames.shape(info.input_size), True


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in eval(), without gradients and TF32; every module's own mode comes back afterwards."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _tensor(model: torch.nn.Module, images: NDArray[Any]) -> torch.Tensor:
    import torch

    parameter = next(model.parameters(), None)
    return torch.from_numpy(images).to("cpu" if parameter is None else parameter.device)


def _run(model: torch.nn.Module, images: NDArray[Any]) -> Array:
    """The model's logits, or what it returned instead in an ExportError."""
    import torch

    hint = "a distillation task or a traced module goes through vx.strip(...) or vx.lower(...) first"
    try:
        output = model(_tensor(model, images))
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} does not run on images {images.shape}: {first_line(error)}; "
            f"pass input_size=(C, H, W) if that is the wrong size; {hint}"
        ) from error
    if isinstance(output, dict):
        raise ExportError(f"{type(model).__name__} returns a dict with {', '.join(map(str, output))}: {hint}")
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ExportError(
            f"{type(model).__name__} returns {shape}: expected logits of shape (batch, classes); {hint}"
        )
    return output.cpu().numpy()


def _to_onnx(model: torch.nn.Module, example: NDArray[Any], opset: int, dynamic_batch: bool) -> ModelProto:
    import torch
    from onnx_ir.passes.common import DeduplicateInitializersPass

    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    try:
        with _silence():
            program = torch.onnx.export(
                model,
                (_tensor(model, example),),
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=shapes,
                custom_translation_table=translations(),
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be written as ONNX: {first_line(error.__cause__ or error)}"
        ) from error
    assert program is not None
    DeduplicateInitializersPass(LARGEST_ONNX)(program.model)  # norms without weights each have ones
    proto = program.model_proto
    _forget_sources(proto)
    proto.producer_name, proto.producer_version = "vmkd-fx", __version__
    return proto


def _forget_sources(proto: ModelProto) -> None:
    """Drop stack traces and the exporter's own notes: they hold the paths of the machine that exported."""
    graph = proto.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for item in (proto, graph, *graph.node, *values):
        kept = [prop for prop in item.metadata_props if prop.key == "namespace"]
        del item.metadata_props[:]
        item.metadata_props.extend(kept)
        item.ClearField("doc_string")


def _refuse_static(proto: ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        batch = value.type.tensor_type.shape.dim[0]
        if not batch.dim_param:
            raise ExportError(
                f"the batch of {value.name!r} came out fixed at {batch.dim_value}: the model's forward bakes "
                "a batch size in (a reshape with a number, a loop over images); use x.shape[0] or -1 there, "
                "or export with dynamic_batch=False"
            )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing printed, warned or logged by the exporter, which speaks under a dozen logger names."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
