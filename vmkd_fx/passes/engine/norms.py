"""Norms over all channels of an image, in a form that engines run right and in which their affine can leave.

    GN(x; g, b), one group, on (B, C, H, W)  =  g LN(x) + b      LN over (C, H, W), no weights; g, b (C, 1, 1)

The affine goes on into what reads it where all of that can take it: a convolution, or through PoolFormer's
"pooling minus its input" a LayerScale. Else it stays, one factor and one term, and the pass that merges
channel affines writes it out over (C, H, W) into the layer norm. TensorRT 10.16 computes GroupNormalization
of one group wrongly, ONNX Runtime takes it apart into 29 nodes, and a LayerNormalization whose weights
broadcast is 2.6 times slower there than one whose weights are written out. Exact up to rounding.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from vmkd_fx.passes.fold.affine import ChannelAffine, along
from vmkd_fx.passes.fold.push import push_forward
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument

aten = torch.ops.aten


def split_group_norms(rewrite: Rewrite) -> None:
    """Every group norm of one group as a layer norm, its affine as far on as it goes."""
    if rewrite.target.kind == "torch":
        return
    left: list[tuple[Node, ChannelAffine]] = []
    for node in rewrite.calls(aten.group_norm):
        if argument(node, "num_groups") != 1:
            continue
        if reason := _refusal(rewrite, node):
            rewrite.refuse(node, reason)
        elif rewrite.take(node, "norms of one group as layer norms"):
            left += _split(rewrite, node)
    changed: set[Node] = set()
    for last, affine in left:
        push_forward(rewrite, last, affine, changed)


GROUP_NORMS = LoweringPass(
    "group_norms", split_group_norms, {"constants": "it reads weights that are constants"}
)


def _refusal(rewrite: Rewrite, node: Node) -> str | None:
    given = [argument(node, name) for name in ("weight", "bias")]
    if any(held is not None and rewrite.constant(held) is None for held in given):
        return "its weights are computed"
    two, three = (held.shape for held in rewrite.held(node))
    return None if two[1:] == three[1:] else "it averages over the batch"


def _split(rewrite: Rewrite, node: Node) -> list[tuple[Node, ChannelAffine]]:
    """Write the layer norm, its factor and its term; the affine that these two are, and its last node."""
    shape = list(rewrite.shape(node))
    source, eps = node.args[0], argument(node, "eps")
    norm = last = rewrite.call(aten.layer_norm.default, source, shape[1:], None, None, eps)
    scale, shift = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    weight, bias = (rewrite.constant(argument(node, name)) for name in ("weight", "bias"))
    if weight is not None:
        scale = along(weight, 1, len(shape))
        last = rewrite.call(aten.mul.Tensor, last, rewrite.put(scale[0], like=argument(node, "weight")))
    members = {last} - {norm}
    if bias is not None:
        shift = along(bias, 1, len(shape))
        last = rewrite.call(aten.add.Tensor, last, rewrite.put(shift[0], like=argument(node, "bias")))
    rewrite.replace(node, last)
    members |= {last} - {norm}
    return [(last, ChannelAffine(norm, scale, shift, frozenset(members)))] if members else []
