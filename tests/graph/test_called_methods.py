"""A forward may call a method of another module, which may do something else in training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vmkd_fx as vx
from tests.checks import assert_computes_the_same
from tests.models import images
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.evaluation import specialise_to_evaluation

SIZE = (3, 32, 32)


class Positions(nn.Module):
    """Makes what another module adds; in training it moves it about at random."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def get(self, height: int, width: int) -> Tensor:
        grid = torch.arange(height * width, dtype=torch.float32).reshape(1, height, width)
        if self.training:
            grid = grid + torch.rand(1)
        return self.of(grid)

    def of(self, grid: Tensor) -> Tensor:
        return grid.sin() * self.scale


class AsksForPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.positions = nn.Conv2d(3, 4, 4, stride=4), Positions()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.positions.get(*x.shape[-2:])
        return (x * self.positions.of(x)).flatten(1)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "way", [lambda graph: graph, copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))]
)
def test_a_method_that_draws_in_training_stays_one_node(
    inside: bool, way: Callable[[TracedModule], TracedModule]
) -> None:
    model = nn.Sequential(nn.Identity(), AsksForPositions()) if inside else AsksForPositions()
    graph = way(vx.trace(copy.deepcopy(model), input_size=SIZE))
    path = "1.positions" if inside else "positions"
    assert [closed.path for closed in graph.closed] == [f"{path}.get"]
    called = [node for node in graph.graph.nodes if node.op == "call_method" and node.target == "get"]
    assert [str(node.args[0].target) for node in called] == [path]
    assert_computes_the_same(graph, model, images())


def test_in_evaluation_the_method_dissolves() -> None:
    model = AsksForPositions().eval()
    graph, _ = specialise_to_evaluation(vx.trace(copy.deepcopy(model), input_size=SIZE))
    assert not [node for node in graph.graph.nodes if node.target in ("positions", "get")]
    torch.testing.assert_close(graph(images()), model(images()), rtol=0, atol=0)
