"""Eight bits by ONNX Runtime's quantiser, in the form that TensorRT and TensorRT-RTX take.

    x -> Q -> DQ -> MatMul <- DQ <- w8      symmetric, signed; a scale a channel of w, one for all of x

Products of an activation with a weight are quantised at their inputs; norms, softmax, activations and the
products inside attention keep the precision of the graph, float32 or half. So do the first and the last
product: the images' own bytes and the logits' order lose most. A residual sum reads its skip arm in eight
bits where another product already does, which is so in convolutional nets and lets an engine add inside the
convolution; the streams of pre-norm transformers, whose few large values would take all the range, stay as
they are.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.deploy.manifest import LARGEST_ONNX
from vmkd_fx.deploy.onnx_file import too_large, write_onnx
from vmkd_fx.deploy.precision.agreement import BATCH, compared, logits_of_file
from vmkd_fx.deploy.precision.asked import Asked
from vmkd_fx.deploy.precision.products import Product, products_of, sign
from vmkd_fx.errors import DataError, ExportError
from vmkd_fx.extras import require
from vmkd_fx.files import drafting
from vmkd_fx.steps import Refusal, Site, Step

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

NEEDS_IMAGES = "int8 and fp8 are scaled by what images reach: give calibrate=, --calibrate FOLDER"

_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm", "MatMul"],
}
"""What TensorRT-RTX refuses otherwise: zero points, int32 biases; and results are rounded where they are read
as operands, so that an activation or a sum behind a product stays inside its kernel.
"""


def quantise(
    source: Path,
    out: Path,
    images: NDArray[Any] | None,
    expected: NDArray[np.float32] | None = None,
    largest: int = LARGEST_ONNX,
) -> tuple[Step, Asked]:
    """Write the ONNX graph `source` to `out` with its products in eight bits.

    Args:
        images: what the graph takes, (B, ...); ranges are the smallest and largest values on these.
        expected: logits of these images in float32; default: those of `source`, which is in float32 then.
        largest: bytes of a file from which on weights lie beside it, in what is written and on the way there.

    Returns:
        The row of the ledger, and what an engine is held against.

    Raises:
        DataError: there are no images.
        ExportError: nothing in the graph can be quantised, or ONNX Runtime does not run the result.
        MissingExtraError: the extra `train` is not installed.
    """
    onnx = require("onnx", "train", "quantising")
    require("onnxruntime", "train", "quantising")
    if images is None or not len(images):
        raise DataError(NEEDS_IMAGES)
    before = onnx.load(source)
    products = products_of(before)
    chosen = [product for product in products if not product.kept]
    if not chosen:
        raise ExportError(
            f"{source}: none of its {len(products)} matrix products and convolutions is quantised: "
            "each is the first, the last, recurrent or of two computed values; deploy it in fp16"
        )
    with drafting(out) as folder:
        with tempfile.TemporaryDirectory() as scratch, _quiet():
            quantised = Path(scratch) / "quantised.onnx"
            _run_quantiser(before, quantised, chosen, images, too_large(before, largest))
            proto = onnx.load(quantised)
        sign(proto, before)
        sums = _restore_other_readers(proto, chosen)
        write_onnx(proto, folder / out.name, largest)
        expected = logits_of_file(source, images) if expected is None else expected
        error, agreement = compared(logits_of_file(folder / out.name, images), expected)
    step = _step(products, f"{sums} sums with an int8 arm", images)
    step = replace(step, nodes=len(proto.graph.node), error=error, agreement=agreement)
    return step, Asked("int8", tuple(refusal.node for refusal in step.refused))


def _step(products: list[Product], detail: str, images: NDArray[Any]) -> Step:
    done = [product for product in products if not product.kept]
    kept = [product for product in products if product.kept]
    return Step(
        "int8",
        f"{len(done)} products in int8, {len(kept)} not, {detail}",
        len(done),
        tuple(Site(product.name, "int8") for product in done),
        tuple(Refusal(product.name, product.kept) for product in kept),
        checked=f"against float32 on {len(images)} calibration images",
    )


def _run_quantiser(
    proto: ModelProto, out: Path, chosen: list[Product], images: NDArray[Any], beside: bool
) -> None:
    """Quantise; where `beside`, the weights lie beside every graph that the quantiser writes."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    size = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value or BATCH

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images[i : i + size] for i in range(0, len(images), size))

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    # A weight on the left has its channels in its rows.
    left = {product.weight: [{"axis": 0}] for product in chosen if product.on_the_left}
    quantize_static(
        proto,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=sorted({product.operator for product in chosen}),
        nodes_to_quantize=[product.name for product in chosen],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=beside,
        extra_options={**_OPTIONS, "TensorQuantOverrides": left},
    )


def _restore_other_readers(proto: ModelProto, chosen: list[Product]) -> int:
    """Let whoever is not quantised read the value itself again, but for sums of convolutions; how many these
    are.

    The quantiser hands the rounded value to everybody who reads it, to norms and to streams too.
    """
    made = {output: node for node in proto.graph.node for output in node.output}
    names = {product.name for product in chosen}
    sums = 0
    for node in proto.graph.node:
        if node.name in names or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for place, name in enumerate(node.input):
            exact = _before_rounding(made, name)
            if exact is None:
                continue
            others = [made.get(other) for other in node.input if other != name]
            if node.op_type == "Add" and any(other and other.op_type == "Conv" for other in others):
                sums += 1
            else:
                node.input[place] = exact
    return sums


def _before_rounding(made: dict[str, NodeProto], name: str) -> str | None:
    """The value that a quantisation and a dequantisation make `name` of; None where they do not."""
    back = made.get(name)
    rounded = made.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
    return rounded.input[0] if rounded is not None and rounded.op_type == "QuantizeLinear" else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises by the root logger."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
