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
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx import __version__
from vmkd_fx.deploy.onnx_operators import translations
from vmkd_fx.errors import ExportError
from vmkd_fx.extras import require
from vmkd_fx.files import writing
from vmkd_fx.steps import Step

if TYPE_CHECKING:
    import torch
    from onnx import ModelProto

OLDEST_OPSET = 18
_LARGEST_FILE = 2**31 - 1  # a protobuf message, and so an ONNX file in one piece, ends here

Array = NDArray[np.float32]


def export(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    opset: int = 20,
    input_size: tuple[int, int, int] | None = None,
    tolerance: float = 1e-5,
) -> Step:
    """Write `model` to `path` as ONNX and check it there.

    The graph takes `images` (B, C, H, W) and gives `logits` (B, classes), both float32.

    Args:
        model: returns one tensor of logits. Exported as in eval(); its own mode is not changed.
        path: the ONNX file. It appears only when every check has passed.
        dynamic_batch: any batch size (checked with 1, 2 and 3), else one image at a time.
        opset: of the ONNX standard; 18 or later.
        input_size: (C, H, W); default: what the model says.
        tolerance: bound on the largest difference between ONNX Runtime and `model` over the largest logit.

    Raises:
        ExportError: the model returns something else than logits, cannot be exported, keeps a fixed batch in
            spite of `dynamic_batch`, or ONNX Runtime computes something else.
        OutputError: `path` cannot be written.
        MissingExtraError: the extra `train` is not installed.
    """
    require("torch", "train", "exporting to ONNX")
    onnx = require("onnx", "train", "exporting to ONNX")
    require("onnxscript", "train", "exporting to ONNX")
    runtime = require("onnxruntime", "train", "checking an exported model")
    if not OLDEST_OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise ExportError(
            f"opset {opset}: the exporter writes {OLDEST_OPSET} to {onnx.defs.onnx_opset_version()}"
        )
    size = _input_size(model, input_size)
    batches = (1, 2, 3) if dynamic_batch else (1,)
    random = np.random.default_rng(0)
    images = [random.standard_normal((batch, *size), dtype=np.float32) for batch in batches]
    with _evaluating(model):
        logits = [_run(model, batch) for batch in images]
        proto = _to_onnx(model, images[1 if dynamic_batch else 0], opset, dynamic_batch)
    if dynamic_batch:
        _refuse_static(proto)
    data = _to_bytes(onnx, proto)
    session = _session(runtime, data)
    error = relative_error([session.run(["logits"], {"images": batch})[0] for batch in images], logits)
    if not error <= tolerance:
        raise ExportError(
            f"ONNX Runtime differs from the model by {error:.1e} (relative), more than the {tolerance:.0e} "
            "allowed: the exporter translated an operator wrongly, or the model is not in float32"
        )
    with writing(path) as temporary:
        temporary.write_bytes(data)
    return Step(
        name="onnx",
        detail=f"opset {opset}, {'dynamic batch' if dynamic_batch else 'batch 1'}, {len(data):,} bytes",
        nodes=len(proto.graph.node),
        error=error,
        tolerance=tolerance,
        checked="ONNX Runtime, "
        + ("batches 1, 2, 3" if dynamic_batch else "batch 1")
        + ("" if any(batch.any() for batch in logits) else " (every logit is 0, which proves little)"),
    )


def relative_error(found: list[Array], expected: list[Array]) -> float:
    """The largest absolute difference over the largest absolute expected value; NaN when either holds one."""
    difference = max(float(np.abs(f - e).max()) for f, e in zip(found, expected, strict=True))
    scale = max(float(np.abs(e).max()) for e in expected)
    return difference / scale if scale else difference


def _input_size(model: torch.nn.Module, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """(C, H, W) as given, or as the model itself states it."""
    from vmkd_fx.graph.info import model_info

    size = model_info(model, given).input_size
    if size is None:
        raise ExportError(f"{type(model).__name__} does not say its input size: pass input_size=(C, H, W)")
    return size


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


def _tensor(model: torch.nn.Module, images: Array) -> torch.Tensor:
    import torch

    parameter = next(model.parameters(), None)
    return torch.from_numpy(images).to("cpu" if parameter is None else parameter.device)


def _run(model: torch.nn.Module, images: Array) -> Array:
    """The model's logits, or what it returned instead in an ExportError."""
    import torch

    hint = "a distillation task or a traced module goes through vx.strip(...) or vx.lower(...) first"
    try:
        output = model(_tensor(model, images))
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} does not run on images {images.shape}: {_first_line(error)}; "
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


def _to_onnx(model: torch.nn.Module, example: Array, opset: int, dynamic_batch: bool) -> ModelProto:
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
            f"{type(model).__name__} cannot be written as ONNX: {_first_line(error.__cause__ or error)}"
        ) from error
    assert program is not None
    DeduplicateInitializersPass(_LARGEST_FILE)(program.model)  # norms without weights each have ones
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


def _to_bytes(onnx: Any, proto: ModelProto) -> bytes:
    if proto.ByteSize() > _LARGEST_FILE:
        raise ExportError(f"the model takes {proto.ByteSize():,} bytes; an ONNX file holds {_LARGEST_FILE:,}")
    data: bytes = proto.SerializeToString(deterministic=True)
    try:
        onnx.checker.check_model(data, full_check=True)  # full_check: strict shape inference as well
    except Exception as error:
        raise ExportError(f"the exporter wrote an invalid ONNX graph: {_first_line(error)}") from error
    return data


def _session(runtime: Any, data: bytes) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime refuses the exported graph: {_first_line(error)}") from error


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


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
