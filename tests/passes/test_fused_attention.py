"""Attention as ONNX Runtime's own operator."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import vmkd_fx as vx
from tests.models import small
from tests.passes.lowering import lowered_by, operators
from tests.passes.test_attention_pass import HEADS, TOKENS, WIDTH, AttentionNet, Heads
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.cleanup.views import VIEWS
from vmkd_fx.passes.engine.attention import ATTENTION
from vmkd_fx.passes.engine.fused_attention import FUSED_ATTENTION
from vmkd_fx.passes.engine.heads import SPLIT_HEADS
from vmkd_fx.passes.engine.score_scale import SCORE_SCALE
from vmkd_fx.passes.rewrite import Rewrite

BEFORE = (ATTENTION, SPLIT_HEADS, VIEWS, SCORE_SCALE)


class ByHeads(AttentionNet):
    """LeViT's order: query, key and value of a head side by side."""

    def cut(self, x: Tensor) -> Heads:
        q, k, v = self.qkv(x).reshape(-1, TOKENS, HEADS, 3 * WIDTH).split([WIDTH] * 3, dim=3)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Apart(AttentionNet):
    """A Linear each, two of them without a bias, and longer values."""

    def __init__(self) -> None:
        super().__init__()
        channels = HEADS * WIDTH
        self.q, self.k = nn.Linear(channels, channels, bias=False), nn.Linear(channels, channels)
        self.v = nn.Linear(channels, 2 * channels, bias=False)
        self.proj = nn.Linear(2 * channels, channels)

    def cut(self, x: Tensor) -> Heads:
        q, k, v = (made(x).reshape(-1, TOKENS, HEADS, size) for made, size in self.sizes())
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        mixed = self.mix(*self.cut(x)).transpose(1, 2).reshape(-1, TOKENS, 2 * HEADS * WIDTH)
        return self.head((x + self.proj(mixed)).mean(1))

    def sizes(self) -> tuple[tuple[nn.Linear, int], ...]:
        return (self.q, WIDTH), (self.k, WIDTH), (self.v, 2 * WIDTH)


class ScoredByPlace(AttentionNet):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) + self.bias[0]).softmax(-1) @ v


class ScoredByImage(AttentionNet):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        return (scores + torch.tanh(v @ v.transpose(-2, -1))).softmax(-1) @ v


class ScoredPlain(AttentionNet):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * 0.7) @ k.transpose(-2, -1)).softmax(-1) @ v


class Normed(AttentionNet):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.norm_q(q) @ self.norm_k(k).transpose(-2, -1)).softmax(-1) @ v


class ReadValues(AttentionNet):
    """The values are read beside the product."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v + torch.tanh(v)


class ReadScores(AttentionNet):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        return scores.softmax(-1) @ v + scores.mean(-1, keepdim=True)


class OverQueries(AttentionNet):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-2) @ v


class MixedTokens(AttentionNet):
    """Half of the key of each token is its neighbour's."""

    def cut(self, x: Tensor) -> Heads:
        q, k, v = super().cut(x)
        return q, k.reshape(-1, HEADS, TOKENS // 2, 2, WIDTH).transpose(3, 4).reshape(k.shape), v


def fused(model: nn.Module, target: str = "onnxruntime") -> tuple[float, TracedModule, Rewrite]:
    size = (3, 16, 16) if isinstance(model, AttentionNet) else (3, 32, 32)
    return lowered_by(model, *BEFORE, FUSED_ATTENTION, target=target, size=size)


@pytest.mark.parametrize("make", [AttentionNet, ByHeads, Apart, ScoredByPlace, ScoredPlain])
def test_attention_of_linears_is_one_operator(make: type[AttentionNet]) -> None:
    error, module, record = fused(make())
    assert error < 1e-12
    assert len(record.sites) == 1
    found = operators(module)
    assert found["vmkd.attention"] == 1
    assert not found["softmax"] and not found["matmul"] and not found["split"]


def test_there_are_rows_for_each_operand_and_no_more() -> None:
    model = small("deit")
    error, module, record = fused(model)
    assert error < 1e-12
    assert len(record.sites) == operators(module)["vmkd.attention"] > 0
    weights = sum(parameter.numel() for parameter in module.parameters())
    assert weights == sum(parameter.numel() for parameter in lowered_by(model, *BEFORE)[1].parameters())
    assert not lowered_by(model, *BEFORE, FUSED_ATTENTION, FUSED_ATTENTION)[2].sites


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Normed, "has no matrix|is no Linear"),
        (ReadValues, "reads"),
        (ReadScores, "is read by other nodes too"),
        (ScoredByImage, "reads"),
        (MixedTokens, "mixes the tokens"),
    ],
)
def test_what_no_operator_computes_stays(make: type[AttentionNet], reason: str) -> None:
    error, module, record = fused(make())
    assert error < 1e-12
    assert not record.sites
    (refusal,) = record.refusals.values()
    assert any(part in refusal.reason for part in reason.split("|"))
    assert operators(module)["softmax"] == 1


@pytest.mark.parametrize("make", [OverQueries])
def test_a_softmax_that_is_no_attention_is_none(make: type[AttentionNet]) -> None:
    assert not fused(make())[2].sites


@pytest.mark.parametrize("target", ["torch", "tensorrt-rtx", "tensorrt"])
def test_other_targets_keep_theirs(target: str) -> None:
    assert not fused(small("deit"), target)[2].sites


def test_the_file_holds_the_operator_and_computes_the_same(tmp_path: Path) -> None:
    low = vx.lower(small("deit"))
    step = vx.export(low, tmp_path / "model.onnx")
    assert step.error is not None and step.error < 1e-5
    model = onnx.load(tmp_path / "model.onnx")
    ours = [node.op_type for node in model.graph.node if node.domain == "com.microsoft"]
    assert set(ours) == {"MultiHeadAttention"}
    assert not any(node.op_type == "Softmax" for node in model.graph.node)
