"""From a lowered graph to an ONNX file in the precision that was asked for."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.deploy.manifest import LARGEST_ONNX
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.deploy.precision.agreement import compared, logits_of_file
from vmkd_fx.deploy.precision.asked import PRECISIONS, Asked
from vmkd_fx.deploy.precision.calibration import pictures
from vmkd_fx.deploy.precision.int8 import NEEDS_IMAGES, quantise
from vmkd_fx.deploy.precision.products import products_in_single
from vmkd_fx.errors import BuildError, DataError, ExportError, UnknownNameError
from vmkd_fx.steps import Ledger, Step

if TYPE_CHECKING:
    from vmkd_fx.graph.traced import TracedModule

BF16_OPSET = 22
"""The first in which convolutions and poolings may be in bfloat16."""


def check_precision(precision: str, target: str, calibrate: object = None) -> None:
    """Refuse what cannot work before any work is done.

    Args:
        target: kind of the target.
        calibrate: images, or a folder of pictures.

    Raises:
        UnknownNameError: there is no such precision.
        DataError: it needs calibration images, and there are none, or no pictures in the folder.
        BuildError: the target does not run it.
        MissingExtraError: fp8, and nvidia-modelopt is not installed.
    """
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    if precision in ("int8", "fp8") and calibrate is None:
        raise DataError(f"precision {precision!r}: {NEEDS_IMAGES}")
    if isinstance(calibrate, (str, os.PathLike)):
        pictures(Path(calibrate))
    if precision in ("bf16", "fp8") and target == "onnxruntime":
        raise BuildError(
            f"ONNX Runtime does not run {precision} on a processor: deploy in fp16, mixed, int8 or fp32, or "
            "for an engine, as in --target tensorrt-rtx:sm89"
        )
    if precision == "fp8":
        from vmkd_fx.deploy.precision.fp8 import need_modelopt

        need_modelopt()


def write_in(
    lowered: TracedModule,
    path: str | os.PathLike[str],
    precision: str = "fp32",
    images: NDArray[Any] | None = None,
    *,
    rest: str = "fp32",
    **options: Any,
) -> tuple[Ledger, Asked]:
    """Write `lowered`, in float32, to `path` as ONNX in `precision`.

    Args:
        images: what the graph takes, (B, ...), to measure ranges and errors on.
        rest: of what int8 and fp8 leave alone: "fp32", or one of `HALVES`, which is what engines are fast at.
        options: for `export`.

    Returns:
        The ledger with the steps of precision and export, and what an engine is held against.

    Raises:
        VmkdError: as `export`, `in_half` and `quantise` say.
    """
    path = Path(path)
    if precision in ("int8", "fp8"):
        return _quantised(lowered, path, precision, images, rest, options)
    if precision == "fp32":
        return lowered.ledger.add(export(lowered, path, **options)), Asked()
    from vmkd_fx.deploy.precision.halves import ASKED, in_half

    graph = in_half(lowered, precision, images)
    if precision == "bf16":
        options = {"opset": BF16_OPSET, **options}
    step = export(graph, path, **options)
    import onnx

    single = products_in_single(onnx.load(path, load_external_data=False))
    planned: Asked = graph.meta[ASKED]
    if single and not planned.kept:
        raise ExportError(
            f"{', '.join(single[:8])} came out in float32 in {path}, and {precision} was asked for: the "
            "exporter writes an operator otherwise than it was planned"
        )
    if precision != "bf16" and images is not None:
        step = _run_as_it_is(step, lowered, path, images)
    return graph.ledger.add(step), Asked(precision, single)


def _quantised(
    lowered: TracedModule,
    path: Path,
    precision: str,
    images: NDArray[Any] | None,
    rest: str,
    options: dict[str, Any],
) -> tuple[Ledger, Asked]:
    from vmkd_fx.deploy.precision.fp8 import in_fp8
    from vmkd_fx.deploy.precision.halves import logits

    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before.onnx"
        ledger, _ = write_in(lowered, before, rest, images, **options)
        expected = None if images is None else logits(lowered, images)
        largest = options.get("largest", LARGEST_ONNX)
        step, asked = (quantise if precision == "int8" else in_fp8)(before, path, images, expected, largest)
    return ledger.add(step), asked


def _run_as_it_is(step: Step, lowered: TracedModule, path: Path, images: NDArray[Any]) -> Step:
    """The export's row with what the file itself, in half, decides in ONNX Runtime."""
    from vmkd_fx.deploy.precision.halves import logits

    error, agreement = compared(logits_of_file(path, images), logits(lowered, images))
    if not np.isfinite(error):
        raise ExportError(f"{path} gives logits in ONNX Runtime that are not finite")
    detail = f"{step.detail}; in ONNX Runtime as it is {error:.1e} from float32"
    return replace(step, detail=detail, agreement=agreement)
