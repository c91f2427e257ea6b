"""A buffer that a forward writes to, held by the model under two paths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vmkd_fx as vx
from vmkd_fx.errors import TraceError
from vmkd_fx.graph.verify import logits_of, randomise_, relative_error

SIZE = (3, 8, 8)


class Levelled(nn.Module):
    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.level.copy_(x.abs().mean() + 0.5)
        return x / self.level


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Levelled()
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Closed(Twice):
    """Another function in training, so tracing leaves it one node, with both paths inside."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if self.training else super().forward(x)


def net(part: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), part, nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return randomise_(model.double().eval())


def test_the_graph_has_it_under_one() -> None:
    model = net(Twice())
    x = torch.randn(5, *SIZE, dtype=torch.float64)
    lowered = vx.lower(vx.trace(model, input_size=SIZE))
    assert relative_error(logits_of(model, x), logits_of(lowered, x)) < 1e-12


def test_both_inside_a_closed_module_are_named() -> None:
    with pytest.raises(TraceError, match=r"writes to 1\.second\.level, which is 1\.first\.level as well"):
        vx.lower(vx.trace(net(Closed()), input_size=SIZE))
