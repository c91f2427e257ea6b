"""Attention for engines: spelled out, its scale in the weights, its heads split along one axis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import vmkd_fx as vx
from tests.models import small
from vmkd_fx.errors import VerificationError
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.engine import score_scale
from vmkd_fx.passes.engine.attention import ATTENTION, additive
from vmkd_fx.passes.engine.heads import SPLIT_HEADS
from vmkd_fx.passes.engine.score_scale import SCORE_SCALE

PASSES = ("constants", ATTENTION, SPLIT_HEADS, SCORE_SCALE)
HEADS, WIDTH, TOKENS = 2, 4, 16

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class AttentionNet(nn.Module):
    """An image in patches, one attention with a residual, a head; members say how q, k and v are used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        channels = HEADS * WIDTH
        self.stem = nn.Conv2d(3, channels, 4, 4)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.norm_q, self.norm_k = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))
        self.head = nn.Linear(channels, 10)

    def cut(self, x: torch.Tensor) -> Heads:
        q, k, v = self.qkv(x).reshape(-1, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        mixed = self.mix(*self.cut(x)).transpose(1, 2).reshape(-1, TOKENS, HEADS * WIDTH)
        return self.head((x + self.proj(mixed)).mean(1))


class Scaled(AttentionNet):
    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, scale=0.3)


class Selected(AttentionNet):
    """Three selects instead of an unbind, the scale before the product, as CaiT has it."""

    def cut(self, x: torch.Tensor) -> Heads:
        qkv = self.qkv(x).reshape(-1, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        return qkv[0] * WIDTH**-0.5, qkv[1], qkv[2]

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class Biased(Selected):
    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=1.0)


class Behind(AttentionNet):
    """The scale behind the product, a division, one a head; then a relative position bias."""

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q @ k.transpose(-2, -1)) / self.temperature + self.bias).softmax(-1) @ v


class Normed(AttentionNet):
    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)


class Keys(AttentionNet):
    """The scale of the keys, behind their transposition."""

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ (k.transpose(-2, -1) * 0.3)).softmax(-1) @ v


class Channels(AttentionNet):
    """Attention between channels (XCiT): the heads before the channels before the tokens."""

    def cut(self, x: torch.Tensor) -> Heads:
        q, k, v = self.qkv(x).reshape(-1, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 4, 1).unbind(0)
        return q, k, v

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
        return ((scores * self.temperature).softmax(-1) @ v).transpose(-2, -1)


class Causal(AttentionNet):
    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Hidden(AttentionNet):
    """A mask of truth values; each token sees those before it."""

    rows = 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(TOKENS, TOKENS).tril(self.rows - 1).bool())

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


class Blind(Hidden):
    """The first token sees nobody."""

    rows = 0


class Computed(AttentionNet):
    """Whom a token sees depends on the image."""

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen = (v[..., :1] > -100).transpose(-2, -1)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class Twice(AttentionNet):
    """The queries are values too, which no scale may change."""

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q * 0.3) @ (k * v).transpose(-2, -1)).softmax(-1) @ q


class Overlapping(AttentionNet):
    """The queries and the values are cut from the same rows."""

    def cut(self, x: torch.Tensor) -> Heads:
        qkv = self.qkv(x).reshape(-1, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        return qkv[0] * 0.3, qkv[1] * qkv[2], qkv[0]

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class Shared(Selected):
    """The Linear that makes q is called again behind it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return logits + self.qkv(self.stem(x).mean((2, 3))).mean(1, keepdim=True)


def lowered(
    model: nn.Module, target: str = "tensorrt-rtx", size: int = 16
) -> tuple[TracedModule, dict[str, int | None]]:
    """The result, which `lower` has proved in float64, and how often each pass has rewritten something."""
    result = vx.lower(vx.trace(model.eval(), input_size=(3, size, size)), target, passes=PASSES)
    return result, {step.name: step.matched for step in vx.ledger(result).steps}


def operators(module: TracedModule) -> Counter[str]:
    return Counter(str(node.target) for node in module.graph.nodes if node.op == "call_function")


def reasons(module: TracedModule) -> str:
    return " | ".join(refusal.reason for step in vx.ledger(module).steps for refusal in step.refused)


@pytest.mark.parametrize(
    ("make", "sites"),
    [
        (AttentionNet, (1, 1, 1)),
        (Scaled, (1, 1, 1)),
        (Selected, (0, 1, 1)),
        (Biased, (1, 1, 1)),
        (Behind, (0, 1, 1)),
        (Normed, (1, 1, 1)),
        (Keys, (0, 1, 1)),
        (Channels, (0, 1, 0)),
        (Causal, (1, 1, 1)),
        (Hidden, (1, 1, 1)),
        (Blind, (0, 1, 0)),
        (Computed, (0, 1, 0)),
        (Twice, (0, 1, 0)),
        (Overlapping, (0, 1, 0)),
        (Shared, (0, 1, 0)),
    ],
)
def test_sites(make: Callable[[], nn.Module], sites: tuple[int, int, int]) -> None:
    module, matched = lowered(make())
    assert tuple(matched[name] for name in ("attention", "split_heads", "score_scale")) == sites
    found = operators(module)
    assert found["aten.unbind.int"] == 0
    assert found["aten.split.Tensor"] == 1
    assert max(step.error for step in vx.ledger(module).steps if step.error is not None) < 1e-13


def test_nothing_is_left_but_products_and_a_softmax() -> None:
    found = operators(lowered(AttentionNet())[0])
    assert found["aten.mul.Tensor"] == found["aten.scaled_dot_product_attention.default"] == 0
    assert (found["aten.matmul.default"], found["aten.softmax.int"], found["aten.linear.default"]) == (
        2,
        1,
        3,
    )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Blind, "its mask hides every key from a query"),
        (Computed, "its mask of truth values is computed"),
        (Twice, "is read by other nodes too"),
        (Overlapping, "reads what"),
        (Shared, "are used 2 times"),
    ],
)
def test_refusals_say_why(make: Callable[[], nn.Module], reason: str) -> None:
    assert reason in reasons(lowered(make())[0])


def test_only_the_rows_of_the_queries_are_scaled() -> None:
    model = AttentionNet()
    module, _ = lowered(model)
    rows = HEADS * WIDTH
    weight, bias = module.get_parameter("qkv.weight"), module.get_parameter("qkv.bias")
    factor = torch.ones(3 * rows, dtype=torch.float64)
    factor[:rows] = WIDTH**-0.5
    torch.testing.assert_close(
        weight.double(), model.qkv.weight.double() * factor[:, None], rtol=1e-7, atol=0
    )
    torch.testing.assert_close(bias.double(), model.qkv.bias.double() * factor, rtol=1e-7, atol=0)


def test_torch_keeps_its_kernel() -> None:
    _, matched = lowered(AttentionNet(), "torch")
    assert (matched["attention"], matched["split_heads"], matched["score_scale"]) == (0, 0, 0)


def test_a_real_vision_transformer() -> None:
    module, matched = lowered(small("deit"), size=32)
    assert (matched["attention"], matched["split_heads"], matched["score_scale"]) == (2, 2, 2)
    assert operators(module)["aten.mul.Tensor"] == 0


def test_it_is_idempotent() -> None:
    once, _ = lowered(AttentionNet())
    again, matched = lowered(once)
    assert (matched["attention"], matched["split_heads"], matched["score_scale"]) == (0, 0, 0)
    assert operators(again) == operators(once)


def test_masks_of_truth_values() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    assert additive(mask, torch.float64).tolist() == [[0.0, float("-inf")], [0.0, 0.0]]


@pytest.mark.parametrize("by", [1.01, -1.0, 0.0])
def test_a_wrong_factor_is_caught(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    right = score_scale.absorb_behind
    monkeypatch.setattr(
        score_scale,
        "absorb_behind",
        lambda rewrite, holder, pair: right(rewrite, holder, (pair[0] * by, pair[1])),
    )
    with pytest.raises(VerificationError, match="pass score_scale"):
        lowered(AttentionNet())


def test_a_factor_of_the_wrong_piece_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = score_scale.grown
    monkeypatch.setattr(
        score_scale, "grown", lambda rewrite, piece, factor: right(rewrite, piece, factor).flip(piece.axis)
    )
    with pytest.raises(VerificationError, match="pass score_scale"):
        lowered(AttentionNet())
