"""Which operator bears half precision: one table, read by the pass, by the tests and by the documentation.

Half has 11 bits and ends at 65504. A product of matrices bears that, for engines sum it in float32; a
statistic does not: a variance squares its input, and a mean over many values adds them up first. What no rule
names stays float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

PRODUCT = "product"
SINGLE = "single"
STATISTIC = "statistic"
AVERAGE = "average"
ARITHMETIC = "arithmetic"
POINTWISE = "pointwise"
MOVE = "move"


@dataclass(frozen=True)
class Rule:
    """What holds for some operators.

    Attributes:
        kind: PRODUCT, half, and what half is for; SINGLE, float32, and the result may be rounded; STATISTIC,
            float32, and so is arithmetic on statistics alone; AVERAGE, a STATISTIC if it is over many values;
            ARITHMETIC and POINTWISE, of several values or of one, half where everything fits; MOVE, as its
            input, or half where all its readers are.
        operators: names in ATen, or of this package's own operators.
        reason: for the ledger and the documentation.
    """

    kind: str
    operators: tuple[str, ...]
    reason: str


LARGE = 32
"""An average over more values than this is a large reduction: 32 of them cost five of half's eleven bits."""

RULES: tuple[Rule, ...] = (
    Rule(
        PRODUCT,
        (
            *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d"),
            *("convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        ),
        "engines sum products in float32",
    ),
    Rule(
        SINGLE,
        ("layer_norm", "group_norm", "rms_norm", "batch_norm", "instance_norm"),
        "a norm squares its input and divides by what may be small",
    ),
    Rule(SINGLE, ("softmax", "log_softmax", "_softmax", "_log_softmax"), "a softmax sums exponentials"),
    Rule(SINGLE, ("softplus", "mish", "logsumexp"), "its exponential leaves half's range at 11"),
    Rule(SINGLE, ("grid_sampler", "grid_sampler_2d"), "half cannot tell neighbouring places apart"),
    Rule(SINGLE, ("vmkd::attention",), "it holds a softmax"),
    Rule(
        SINGLE,
        ("vmkd::circulant", "vmkd::global_filter", "vmkd::dft_filter"),
        "a transform sums over all tokens",
    ),
    Rule(
        STATISTIC,
        (
            *("sum", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "prod"),
            *("cumsum", "cumprod"),
        ),
        "a large reduction",
    ),
    Rule(
        STATISTIC,
        (
            *("pow", "square", "exp", "exp2", "expm1", "log", "log2", "log1p"),
            *("sqrt", "rsqrt", "reciprocal"),
        ),
        "it stretches the range of its input",
    ),
    Rule(
        AVERAGE,
        ("mean", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
        "a large reduction",
    ),
    Rule(
        ARITHMETIC,
        (
            *("add", "sub", "rsub", "mul", "div", "addcmul", "addcdiv", "lerp", "where", "masked_fill"),
            *("maximum", "minimum", "cat", "stack"),
        ),
        "half where operands and result fit",
    ),
    Rule(
        POINTWISE,
        (
            *("relu", "relu6", "gelu", "silu", "sigmoid", "hardsigmoid", "hardswish", "hardtanh", "tanh"),
            *("leaky_relu", "prelu", "elu", "selu", "celu", "clamp", "clamp_min", "clamp_max", "neg", "abs"),
            *("erf", "sin", "cos"),
        ),
        "half where input and result fit",
    ),
    Rule(
        MOVE,
        (
            *("reshape", "view", "permute", "transpose", "t", "flatten", "unflatten", "unsqueeze", "squeeze"),
            *("expand", "expand_as", "repeat", "tile", "slice", "select", "narrow", "split", "chunk"),
            *("split_with_sizes", "tensor_split", "unbind", "getitem", "index", "index_select", "gather"),
            *("take_along_dim", "roll", "flip", "pad", "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle"),
            *("unfold", "im2col", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices"),
            *("adaptive_max_pool2d", "amax", "amin", "max", "min", "channel_shuffle", "clone", "contiguous"),
            *("movedim", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
        ),
        "it moves or picks values",
    ),
)

NO_RULE = Rule(SINGLE, (), "no rule says that it bears half precision")

_BY_OPERATOR = {operator: rule for rule in RULES for operator in rule.operators}


def operator_name(node: Node) -> str:
    """The name of an operator without its overload, as the table has it; "" for another library's."""
    namespace = getattr(node.target, "namespace", None)
    if namespace in ("aten", "vmkd"):
        name = str(node.target._opname)  # type: ignore[union-attr]
        return name if namespace == "aten" else f"{namespace}::{name}"
    return "getitem" if getattr(node.target, "__name__", "") == "getitem" else ""


def rule_of(node: Node) -> Rule:
    """The rule for what `node` calls."""
    return _BY_OPERATOR.get(operator_name(node), NO_RULE)
