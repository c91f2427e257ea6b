"""How our own operators are written in ONNX: onnxscript functions, for the exporter's translation table.

    torch.onnx.export(..., custom_translation_table=translations())

Lowering leaves `vmkd::dft_filter`, where it chose the DFT, and for ONNX Runtime
`vmkd::attention`. The two others are here so that a graph that was not lowered can be exported too; their
weights are then transformed in the file, in its own precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmkd_fx.extras import require

_RUNTIME = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
_ATTENTION = "MultiHeadAttention"


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator to onnxscript function, for `custom_translation_table`.

    Raises:
        MissingExtraError: onnxscript is not installed.
    """
    require("onnxscript", "train", "an ONNX file")
    import torch

    from vmkd_fx.passes.engine import runtime_operators  # noqa: F401  (registers the operator)
    from vmkd_fx.passes.mixing import operators  # noqa: F401  (registers the operators)

    return {
        torch.ops.aten.index_select.default: _index_select,
        torch.ops.vmkd.attention.default: _attention,
        torch.ops.vmkd.dft_filter.default: _dft_filter,
        torch.ops.vmkd.circulant.default: _circulant,
        torch.ops.vmkd.global_filter.default: _global_filter,
    }


def _index_select(x: Any, dim: int, index: Any) -> Any:
    """With the index in the type that it has: where that is int64, TensorRT's parser adds a cast to int32."""
    from onnxscript.onnx_opset import opset18 as op

    return op.Gather(x, index, axis=dim)


def _attention(query: Any, key: Any, value: Any, bias: Any, mask: Any, heads: int) -> Any:
    """ONNX Runtime's own operator; the scale is in the weights."""
    from onnxscript.values import Op, Opset

    operator = Op(Opset(_RUNTIME, 1), _ATTENTION, _attention_schema())
    return operator(query, key, value, bias, None, mask, num_heads=heads, scale=1.0)


def _attention_schema() -> Any:
    """What the exporter has to know of an operator that ONNX itself does not define."""
    from onnx.defs import OpSchema

    optional = OpSchema.FormalParameterOption.Optional
    names = ("query", "key", "value", "bias", "key_padding_mask", "attention_bias")
    attributes = (("num_heads", OpSchema.AttrType.INT), ("scale", OpSchema.AttrType.FLOAT))
    return OpSchema(
        _ATTENTION,
        _RUNTIME,
        1,
        inputs=[OpSchema.FormalParameter(name, "T", param_option=optional) for name in names],
        outputs=[OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[OpSchema.Attribute(name, kind, "", required=False) for name, kind in attributes],
    )


def _dft_filter(x: Any, direct: Any, crossed: Any) -> Any:
    """y = Re(idft(direct * X + crossed * swapped X)), X = dft(x), over all axes between first and last."""
    from onnxscript.onnx_opset import opset18 as op

    *axes, last = range(1, len(x.shape) - 1)
    waves = op.DFT(op.Unsqueeze(x, [-1]), axis=last, onesided=1)
    for axis in axes:
        waves = op.DFT(waves, axis=axis)
    swapped = op.Slice(waves, [1], [-3], [-1], [-1])
    waves = op.Add(op.Mul(waves, direct), op.Mul(swapped, crossed))
    for axis in axes:
        waves = op.DFT(waves, axis=axis, inverse=1)
    # A one-sided inverse is younger than DFT itself; an inverse that pads with zeros is as old.
    length = op.Constant(value_int=int(x.shape[last]))
    waves = op.DFT(waves, length, axis=last, inverse=1)
    return op.Squeeze(op.Slice(waves, [0], [1], [-1]), [-1])


def _circulant(x: Any, weight: Any) -> Any:
    """The response is conj(dft(w)), each group's at its channels: c mod G."""
    from onnxscript.onnx_opset import opset18 as op

    groups, tokens = (int(size) for size in weight.shape)
    members = int(x.shape[2]) // groups
    response = op.DFT(op.Unsqueeze(op.Transpose(weight, perm=[1, 0]), [0, -1]), axis=1, onesided=1)
    response = op.Tile(op.Squeeze(response, [0]), [1, members, 1])
    return _dft_filter(x, *_factors(op.Mul(response, _constant([1.0, -1.0], weight)), tokens))


def _global_filter(x: Any, weight: Any) -> Any:
    """The response is the weight itself."""
    return _dft_filter(x, *_factors(weight, int(x.shape[2])))


def _factors(response: Any, width: int) -> tuple[Any, Any]:
    """The factors of `vmkd::dft_filter` from a response (..., width // 2 + 1, C, 2)."""
    from onnxscript.onnx_opset import opset18 as op

    doubled = [1.0 if 2 * f in (0, width) else 2.0 for f in range(width // 2 + 1)]
    response = op.Mul(response, op.Unsqueeze(_constant(doubled, response), [1, 2]))
    real, imaginary = op.Slice(response, [0], [1], [-1]), op.Slice(response, [1], [2], [-1])
    direct = op.Concat(real, real, axis=-1)
    return direct, op.Concat(op.Neg(imaginary), imaginary, axis=-1)


def _constant(values: list[float], like: Any) -> Any:
    from onnxscript.onnx_opset import opset18 as op

    return op.CastLike(op.Constant(value_floats=values), like)
