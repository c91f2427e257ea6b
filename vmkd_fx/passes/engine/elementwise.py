"""Operators that treat every number alike, wherever it stands."""

from __future__ import annotations

import torch

from vmkd_fx.passes.rewrite import is_call

aten = torch.ops.aten

ELEMENTWISE = (
    *(
        aten.gelu,
        aten.relu,
        aten.silu,
        aten.sigmoid,
        aten.tanh,
        aten.hardswish,
        aten.hardsigmoid,
        aten.hardtanh,
    ),
    *(
        aten.leaky_relu,
        aten.elu,
        aten.mish,
        aten.softplus,
        aten.relu6,
        aten.clamp,
        aten.exp,
        aten.neg,
        aten.abs,
    ),
    *(aten.square, aten.sqrt, aten.rsqrt, aten.erf),
)


def is_elementwise(node: object) -> bool:
    """Whether a node is a function of one operand, number by number."""
    return is_call(node, *ELEMENTWISE) or is_call(node, aten.pow.Tensor_Scalar)
