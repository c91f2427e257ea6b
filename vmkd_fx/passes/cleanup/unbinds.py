"""Cut by a split instead of taking pieces without their axis.

    unbind(x, axis)[i] = reshape(split(x, 1, axis)[i])

In ONNX `unbind` is a split and a squeeze for every piece; a reshape in its place becomes one with the
reshapes and permutations behind it. Exact.
"""

from __future__ import annotations

import operator

import torch

from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, argument, is_call

aten = torch.ops.aten


def split_unbinds(rewrite: Rewrite) -> None:
    """Rewrite each `unbind` along an axis of fixed length."""
    if rewrite.target.kind == "torch":
        return
    for node in rewrite.calls(aten.unbind):
        source = node.args[0]
        axis = argument(node, "dim", 0) % len(rewrite.shape(source))  # type: ignore[arg-type]
        batch = rewrite.batched(source)  # type: ignore[arg-type]
        if batch == axis:
            rewrite.refuse(node, "it takes single images")
            continue
        if not all(is_call(user, operator.getitem) for user in node.users) or not rewrite.take(
            node, "pieces split"
        ):
            continue
        whole = rewrite.call(aten.split.Tensor, source, 1, axis)
        for user in list(node.users):
            rewrite.at(user)
            shape = [
                -1 if place == rewrite.batched(user) else edge
                for place, edge in enumerate(rewrite.shape(user))
            ]
            piece = rewrite.call(operator.getitem, whole, user.args[1])
            rewrite.replace(user, rewrite.call(aten.reshape.default, piece, shape))


UNBINDS = LoweringPass(
    "unbinds",
    split_unbinds,
    {"split_heads": "it takes one axis less where a reshape made the axis that is cut"},
)
