"""Eight-bit floating point by NVIDIA's ModelOpt, where it is installed: for GPUs from sm89 on.

The same products as in int8 are left alone, and those that ModelOpt itself leaves. Its dependencies clash
with those of others, so it is no extra of this package and lives best in an environment of its own.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.deploy.manifest import LARGEST_ONNX
from vmkd_fx.deploy.onnx_file import too_large, write_onnx
from vmkd_fx.deploy.precision.agreement import compared, logits_of_file
from vmkd_fx.deploy.precision.asked import Asked
from vmkd_fx.deploy.precision.int8 import NEEDS_IMAGES
from vmkd_fx.deploy.precision.products import products_of, sign, unquantised
from vmkd_fx.errors import DataError, ExportError, MissingExtraError
from vmkd_fx.extras import require
from vmkd_fx.files import drafting
from vmkd_fx.steps import Refusal, Site, Step


def need_modelopt() -> None:
    """Raise a MissingExtraError that says how to install it if it is missing."""
    if find_spec("modelopt") is None:
        raise MissingExtraError(
            "fp8 needs the package nvidia-modelopt, which is not installed: in an environment of its own, "
            "pip install 'nvidia-modelopt[onnx]' and vmkd-fx; or deploy in int8, which needs nothing more"
        )


def in_fp8(
    source: Path,
    out: Path,
    images: NDArray[Any] | None,
    expected: NDArray[np.float32] | None = None,
    largest: int = LARGEST_ONNX,
) -> tuple[Step, Asked]:
    """Write the ONNX graph `source` to `out` with its products in eight-bit floating point.

    Args:
        images: what the graph takes, (B, ...); a scale is the largest magnitude on these over fp8's largest.
        expected: logits of these images in float32; default: those of `source`, which is in float32 then.
        largest: bytes of a file from which on weights lie beside it, in what is written and on the way there.

    Returns:
        The row of the ledger, and what an engine is held against.

    Raises:
        DataError: there are no images.
        ExportError: ModelOpt fails, or quantises nothing.
        MissingExtraError: it is not installed.
    """
    need_modelopt()
    onnx = require("onnx", "train", "quantising")
    if images is None or not len(images):
        raise DataError(NEEDS_IMAGES)
    before = onnx.load(source)
    products = products_of(before)
    spared = {product.name: product.kept for product in products if product.kept}
    with drafting(out) as folder:
        with tempfile.TemporaryDirectory() as scratch:
            quantised = Path(scratch) / "quantised.onnx"
            _run_modelopt(source, quantised, list(spared), images, too_large(before, largest))
            proto = onnx.load(quantised)
        sign(proto, before)
        write_onnx(proto, folder / out.name, largest)
        left = unquantised(proto)
        if len(left) == len(products):
            raise ExportError(f"ModelOpt quantised none of the {len(products)} products; deploy it in fp16")
        found = logits_of_file(folder / out.name, images, as_written=True)
        error, agreement = compared(found, logits_of_file(source, images) if expected is None else expected)
    done = [product.name for product in products if product.name not in left]
    step = Step(
        "fp8",
        f"{len(done)} products in fp8, {len(left)} not",
        len(done),
        tuple(Site(name, "fp8") for name in done),
        tuple(Refusal(name, spared.get(name, "ModelOpt leaves it alone")) for name in left),
        nodes=len(proto.graph.node),
        error=error,
        checked=f"against float32 on {len(images)} calibration images",
        agreement=agreement,
    )
    return step, Asked("fp8", left)


def _run_modelopt(source: Path, out: Path, spared: list[str], images: NDArray[Any], beside: bool) -> None:
    """Quantise; where `beside`, the weights lie beside every graph that ModelOpt writes."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from modelopt.onnx.quantization import quantize

            quantize(
                str(source),
                quantize_mode="fp8",
                calibration_data={"images": images},
                calibration_method="max",
                calibration_eps=["cpu"],
                nodes_to_exclude=[f"{re.escape(name)}$" for name in spared],
                high_precision_dtype="fp32",
                use_external_data_format=beside,
                output_path=str(out),
            )
    except Exception as error:
        raise ExportError(f"ModelOpt cannot quantise {source.name}: {error}") from error
    finally:
        logging.disable(level)
