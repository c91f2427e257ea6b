"""Linear layers over tokens without transpositions, and over channels as one matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.models import small
from tests.passes.lowering import lowered_by, operators
from tests.slow import rest_slow
from vmkd_fx.passes.cleanup.views import VIEWS
from vmkd_fx.passes.engine.flat_tokens import FLAT_TOKENS
from vmkd_fx.passes.engine.token_linear import TOKEN_LINEAR


class Tokens(nn.Module):
    """Sixteen tokens of eight channels, a body, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.norm = nn.LayerNorm(8)
        self.over_tokens = nn.Linear(16, 16)
        self.one, self.two = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)
        self.gamma = nn.Parameter(torch.rand(1, 1, 8) + 0.5)
        self.place = nn.Parameter(torch.randn(1, 16, 1))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class ReadBetween(Tokens):
    def body(self, x: Tensor) -> Tensor:
        y = self.over_tokens(x.transpose(1, 2))
        return torch.tanh(y).transpose(1, 2) + y.sum((1, 2), keepdim=True)


class NormBetween(Tokens):
    def body(self, x: Tensor) -> Tensor:
        y = nn.functional.layer_norm(self.over_tokens(x.transpose(1, 2)), (16,))
        return torch.tanh(y).transpose(1, 2)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize(("family", "mixers"), rest_slow([("mixer", 2), ("resmlp", 2)]))
def test_token_mixers_need_no_transpositions(family: str, mixers: int, target: str) -> None:
    before = operators(lowered_by(small(family), VIEWS)[1])
    error, module, record = lowered_by(small(family), VIEWS, TOKEN_LINEAR, target=target)
    assert error < 1e-12
    assert len(record.sites) == mixers
    after = operators(module)
    assert before["permute"] - after["permute"] == 2 * mixers
    assert after["conv1d" if target == "onnxruntime" else "matmul"] == before["linear"] - after["linear"] > 0
    assert not lowered_by(small(family), VIEWS, TOKEN_LINEAR, TOKEN_LINEAR, target=target)[2].sites


@pytest.mark.parametrize("make", [ReadBetween, NormBetween])
def test_what_is_more_than_a_token_mixer_keeps_them(make: type[Tokens]) -> None:
    error, _, record = lowered_by(make(), TOKEN_LINEAR)
    assert error == 0
    assert not record.sites


class Mlps(Tokens):
    """Three MLPs in a row: three additions saved for two reshapes."""

    def body(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.gamma * self.two(torch.tanh(self.one(self.norm(x)) - 0.5))
        return x


class OneMlp(Tokens):
    def body(self, x: Tensor) -> Tensor:
        return (x * self.place) + self.two(torch.tanh(self.one(self.norm(x))))


class PerPlace(Tokens):
    """Scaled by place in between, which one matrix of all tokens cannot tell."""

    def body(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.place * self.two(torch.tanh(self.one(self.norm(x))))
        return x


@pytest.mark.parametrize(("make", "sites"), [(Mlps, 1), (OneMlp, 0), (PerPlace, 0)])
def test_tokens_become_one_matrix_where_it_pays(make: type[Tokens], sites: int) -> None:
    error, _, _ = lowered_by(make(), FLAT_TOKENS, VIEWS)
    assert error < 1e-13
    _, flat, record = lowered_by(make(), FLAT_TOKENS)
    assert len(record.sites) == sites
    linears = [node for node in flat.graph.nodes if str(node.target) == "aten.linear.default"]
    assert len(linears) == (2 if make is OneMlp else 6) + 1
    assert not lowered_by(make(), FLAT_TOKENS, FLAT_TOKENS)[2].sites


def test_attention_reads_heads_from_the_matrix() -> None:
    error, module, _ = lowered_by(small("deit"), FLAT_TOKENS, VIEWS)
    assert error < 1e-12
    assert operators(module)["reshape"] <= operators(lowered_by(small("deit"), VIEWS)[1])["reshape"] + 3
