"""Shapes in a graph of ATen operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vmkd_fx as vx
from vmkd_fx.graph.normal_form import normal_form
from vmkd_fx.graph.sizes import Sizes


class SummedUnderAutocast(nn.Module):
    """Two blocks of one signature, which sum along different axes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            channels = (x * self.scale).sum(-1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            places = (x * self.scale).sum(1)
        return torch.cat([channels, places], 1)


def test_two_blocks_with_equal_inputs_are_two_calls() -> None:
    module = normal_form(vx.trace(SummedUnderAutocast().eval(), input_size=(3, 2, 4)))
    sizes = Sizes(module, (3, 2, 4))
    blocks = module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_autocast)
    results = [result for block in blocks for result in tree_leaves(sizes.held(block)[0])]
    assert [tuple(result.shape) for result in results] == [(2, 3), (2, 8)]
