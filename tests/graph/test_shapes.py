"""Shapes by formula are the shapes that torch finds."""

from __future__ import annotations

import time
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vmkd_fx as vx
from tests.models import small
from tests.zoo import DIVERSE, Member, build, by_family
from vmkd_fx.errors import ModelError
from vmkd_fx.graph.rules import Sized
from vmkd_fx.graph.shapes import node_shapes
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import NodeValues


def _known(graph: TracedModule, rules: bool) -> dict[str, Any]:
    values = NodeValues(graph, (2, *graph.info.need_input_size()), rules=rules)
    return {node.name: values.of(node) for node in graph.graph.nodes}


@pytest.mark.parametrize("member", by_family(DIVERSE))
def test_rules_agree_with_torch(member: Member) -> None:
    with torch.device("meta"):
        model = build(member)
    graph = vx.trace(model, input_size=(3, member.size, member.size))
    with_rules, without = _known(graph, True), _known(graph, False)
    assert with_rules == without
    assert sum(isinstance(value, Sized) for value in with_rules.values()) > 20


class Everything(nn.Module):
    """Each operation that has a rule, and calls of it that its rule leaves to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.same = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.line = nn.Linear(8, 6)
        self.twice = nn.Conv2d(8, 8, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.same(self.conv(x)))
        y = x.flatten(2).transpose(1, 2)
        tokens = self.line(y)
        q, k, v = tokens.reshape(tokens.shape[0], -1, 3, 2).permute(2, 0, 1, 3).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k[:, :1], v[:, :1])
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v + y * 2 / 3 - 1
        y = y.softmax(-1, dtype=torch.float64).float() + F.softmax(y, -1, dtype=torch.float64).float()
        y = torch.cat(y.chunk(5, dim=1), dim=1) + (y > 0) * 1 + y.pow(2).mean(-1, keepdim=True).rsqrt()
        y = y + y.mean((0, 1)) + y.mean() + y.mean(1, True) + torch.mean(y, dim=-1, keepdim=True)
        z = self.twice(x.double()) + x * torch.ones((), dtype=torch.float64) + x.int() / 2 + x.int().sum()
        z = z + self.twice.weight.sum() + x.half().mean() + x.unsqueeze(1).squeeze(1).contiguous()
        return (
            y.sum((1, 2))
            + z[:, 0, ..., None].expand(-1, -1, -1, 3).sum((1, 2, 3))
            + x.view(x.size(0), -1).sum(1)
        )


def test_rules_agree_with_torch_where_they_give_up() -> None:
    graph = vx.trace(Everything(), input_size=(3, 9, 10))
    assert _known(graph, True) == _known(graph, False)
    x = torch.randn(2, 3, 9, 10)
    assert graph(x).shape == _known(graph, True)["output"].shape


class AsksForLayout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(2, 3)
        return x * 2 if x.is_contiguous() else x * x.stride(1)


def test_layout_is_not_guessed_from_shapes() -> None:
    graph = vx.trace(AsksForLayout(), input_size=(3, 4, 5))
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(graph(x), AsksForLayout()(x))


def test_images_that_do_not_pass_are_refused() -> None:
    graph = vx.trace(small("mixer"))
    graph.meta["info"] = vx.trace(nn.Identity(), input_size=(3, 48, 48)).info
    with pytest.raises(ModelError, match=r"images of size \(3, 48, 48\) do not pass"):
        node_shapes(graph)


def test_rules_are_several_times_faster() -> None:
    graph = vx.trace(timm.create_model("deit_tiny_patch16_224", img_size=32))

    def cost(rules: bool) -> float:
        start = time.perf_counter()
        _known(graph, rules)
        return time.perf_counter() - start

    fastest = {rules: min(cost(rules) for _ in range(3)) for rules in (True, False)}
    assert fastest[True] < fastest[False] / 3
