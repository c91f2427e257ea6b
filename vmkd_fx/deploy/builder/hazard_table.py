"""Known defects of the builders, as data: which versions, what to look for in the graph, what goes wrong.

A hazard is "refused" where the engine would be silently wrong, could not be built, or would take the process
down; it is a "warning" where it depends on the GPU or on the values, which only running the engine can tell.
"Measured" means seen with the version named; a range without an end has no release known to be free of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmkd_fx.deploy.builder.names import Version

REFUSED, WARNING = "refused", "warning"


@dataclass(frozen=True)
class Hazard:
    """One defect of one package.

    Attributes:
        name: for people.
        kind: of the target, "tensorrt" or "tensorrt-rtx".
        since: the first version that has it.
        before: the first version that does not; None where none is known.
        pattern: its detector, a key of `hazards.PATTERNS`.
        answer: `REFUSED` or `WARNING`.
        what: goes wrong.
        mend: what would work.
        reference: where it is known from.
        sms: the compute capabilities that it needs; empty for any.
    """

    name: str
    kind: str
    since: Version
    before: Version | None
    pattern: str
    answer: str
    what: str
    mend: str
    reference: str
    sms: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.what}; {self.mend} [{self.reference}]"

    @property
    def versions(self) -> str:
        """As in "10.3 to below 11.2"."""
        start = ".".join(map(str, self.since))
        return f"{start} to below {'.'.join(map(str, self.before))}" if self.before else f"{start} and later"


_LOWER = "lower the model for this target (vmkd lower, vmkd deploy)"
_GROUP_NORM = (
    "each channel is normalised alone instead of all channels together: wrong results without a word"
)

HAZARDS = (
    Hazard(
        "group norm of one group",
        "tensorrt",
        (10, 0),
        None,
        "group_norm_of_one_group",
        REFUSED,
        _GROUP_NORM,
        f"{_LOWER}: it becomes a layer norm",
        "NVIDIA/TensorRT#4756, onnx/onnx-tensorrt#1052",
    ),
    Hazard(
        "group norm of one group",
        "tensorrt-rtx",
        (1, 0),
        None,
        "group_norm_of_one_group",
        REFUSED,
        _GROUP_NORM,
        f"{_LOWER}: it becomes a layer norm",
        "NVIDIA/TensorRT#4756; measured: TensorRT-RTX 1.7.1.116 parses it without the channel axis",
    ),
    Hazard(
        "group norm with a weight a channel",
        "tensorrt",
        (10, 0),
        (10, 8),
        "group_norm_of_opset_21",
        REFUSED,
        "the parser knows the operator of opset 18, with a weight a group, and refuses the graph",
        "export with opset=20",
        "NVIDIA/TensorRT#4336, NVIDIA/TensorRT#4313; seen in 10.7",
    ),
    Hazard(
        "opset above 20",
        "tensorrt",
        (10, 0),
        (10, 4),
        "opset_above_20",
        REFUSED,
        "its parser knows the operators up to opset 20 and takes newer ones for those",
        "export with opset=20",
        "onnx-tensorrt, docs/operators.md of 10.3",
    ),
    Hazard(
        "opset above 24",
        "tensorrt",
        (10, 15),
        (11, 0),
        "opset_above_24",
        WARNING,
        "its parser is made for operators up to opset 24",
        "export with opset=20",
        "onnx-tensorrt, docs/operators.md of 10.15",
    ),
    Hazard(
        "DFT",
        "tensorrt",
        (10, 0),
        (11, 2),
        "dft",
        REFUSED,
        "the operator is not there",
        f"{_LOWER}: the filter becomes matrix products",
        "release notes of TensorRT 11.2",
    ),
    Hazard(
        "DFT",
        "tensorrt-rtx",
        (1, 0),
        None,
        "dft",
        REFUSED,
        "the operator is not there",
        f"{_LOWER}: the filter becomes matrix products",
        "measured with TensorRT-RTX 1.7.1.116",
    ),
    Hazard(
        "Col2Im",
        "tensorrt",
        (10, 0),
        None,
        "col2im",
        REFUSED,
        "the operator is not there",
        "write the fold as a transposed convolution",
        "onnx-tensorrt, docs/operators.md of 10.15",
    ),
    Hazard(
        "Col2Im",
        "tensorrt-rtx",
        (1, 0),
        None,
        "col2im",
        REFUSED,
        "the operator is not there",
        "write the fold as a transposed convolution",
        "measured with TensorRT-RTX 1.7.1.116",
    ),
    Hazard(
        "Attention",
        "tensorrt",
        (10, 0),
        (10, 14),
        "attention",
        REFUSED,
        "the operator is not there",
        "export with opset=20, where attention is matrix products and a softmax",
        "changelog of TensorRT 10.14",
    ),
    Hazard(
        "Attention",
        "tensorrt",
        (10, 14),
        None,
        "attention",
        WARNING,
        "some shapes and data types have no kernel and fail in the build",
        "export with opset=20, where attention is matrix products and a softmax",
        "NVIDIA/TensorRT#4705, NVIDIA/TensorRT#4739",
    ),
    Hazard(
        "Attention in float32",
        "tensorrt-rtx",
        (1, 0),
        None,
        "attention_in_float",
        REFUSED,
        "there is no kernel for it and the build fails",
        "export with opset=20, where attention is matrix products and a softmax",
        "measured with TensorRT-RTX 1.7.1.116",
    ),
    Hazard(
        "Attention of one tensor",
        "tensorrt-rtx",
        (1, 0),
        None,
        "attention_of_one_tensor",
        REFUSED,
        "query, key and value are one tensor: the builder takes the whole process down",
        "export with opset=20, where attention is matrix products and a softmax",
        "measured with TensorRT-RTX 1.7.1.116: a segmentation fault in every precision",
    ),
    Hazard(
        "RMSNormalization",
        "tensorrt",
        (10, 0),
        (10, 15),
        "rms_normalization",
        REFUSED,
        "the operator is not there",
        "export with opset=20, where it is spelled out",
        "changelog of onnx-tensorrt 10.15",
    ),
    Hazard(
        "quantisation to uint8",
        "tensorrt",
        (10, 0),
        None,
        "quantisation_to_uint8",
        REFUSED,
        "the parser takes uint8 for int8 without a word: everything above 127 steps is cut off",
        "quantise symmetrically to int8",
        "TensorRT developer guide, explicit quantisation: int8 is the only integer of eight bits",
    ),
    Hazard(
        "quantisation to uint8",
        "tensorrt-rtx",
        (1, 0),
        None,
        "quantisation_to_uint8",
        REFUSED,
        "the parser takes uint8 for int8 without a word: everything above 127 steps is cut off",
        "quantise symmetrically to int8",
        "measured with TensorRT-RTX 1.7.1.116",
    ),
    Hazard(
        "layer norm in half precision",
        "tensorrt",
        (10, 0),
        None,
        "layer_norm_in_half",
        WARNING,
        "the squares of large activations overflow: NaN, or one class for every image",
        "keep norms in float32 (--precision fp16 does)",
        "NVIDIA/TensorRT#2709, NVIDIA/TensorRT#4723",
    ),
    Hazard(
        "layer norm in half precision",
        "tensorrt-rtx",
        (1, 0),
        None,
        "layer_norm_in_half",
        WARNING,
        "the squares of large activations may overflow: NaN, or one class for every image",
        "keep norms in float32 (--precision fp16 does)",
        "NVIDIA/TensorRT#2709",
    ),
    Hazard(
        "attention in half precision on sm120",
        "tensorrt",
        (10, 0),
        None,
        "softmax_in_half",
        WARNING,
        "the fused attention of consumer Blackwell can be silently wrong in fp16 and bf16",
        "keep the softmax in float32 (--precision fp16 does), and compare on the GPU: vmkd verify",
        "NVIDIA/TensorRT#4837, seen up to 10.16.1",
        sms=(120,),
    ),
    Hazard(
        "residual sum with a concatenated operand",
        "tensorrt",
        (11, 2),
        None,
        "residual_of_concatenated",
        WARNING,
        "in half precision a fused convolution, activation and sum may read wrong elements, without a word",
        "compare on the GPU: vmkd verify",
        "NVIDIA/TensorRT#4854, seen in 11.2.1",
    ),
    Hazard(
        "float32 or bfloat16 matrix product on sm75",
        "tensorrt-rtx",
        (1, 0),
        None,
        "products_not_in_half",
        REFUSED,
        "sm75 takes matrix products in half precision only",
        "leave sm75 out, or convert the model to half first",
        "measured with TensorRT-RTX 1.7.1.116",
        sms=(75,),
    ),
)
