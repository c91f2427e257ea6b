"""Shifts as convolutions, channels first where that moves less, and what is cut, repeated or averaged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.passes.lowering import lowered_by, operators
from tests.slow import rest_slow
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.models.cycle_fc import CycleFC, cycle_shift, in_shift_order
from vmkd_fx.passes.cleanup.expands import EXPANDS
from vmkd_fx.passes.cleanup.means import MEANS
from vmkd_fx.passes.cleanup.shifts import SHIFTS
from vmkd_fx.passes.cleanup.unbinds import UNBINDS
from vmkd_fx.passes.engine.channels_first import CHANNELS_FIRST
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite

Body = Callable[["Maps", Tensor], Tensor]


class Maps(nn.Module):
    """A map (B, 8, 4, 4), a body and a head."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.stem, self.conv = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.along_h, self.along_w = CycleFC(8, 8, (3, 1)), CycleFC(8, 8, (1, 3))
        self.norm, self.gate = nn.LayerNorm(8), nn.Linear(8, 8)
        self.token = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, self.stem(x)).flatten(2).mean(2))


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def ran(body: Body, *passes: LoweringPass, target: str = "onnxruntime") -> tuple[TracedModule, Rewrite]:
    """What `lowered_by` gives, with the error held."""
    torch.manual_seed(0)
    error, module, record = lowered_by(Maps(body), *passes, target=target)
    assert error < 1e-12
    return module, record


def cycle(net: Maps, x: Tensor) -> Tensor:
    y = last(x)
    return first(torch.tanh(net.along_h(y)) + net.along_w(y))


def unordered(net: Maps, x: Tensor) -> Tensor:
    """The order of the channels stays, for an activation reads them."""
    return first(torch.tanh(cycle_shift(last(x), (1, 3))))


def joined(net: Maps, x: Tensor) -> Tensor:
    """Channels in their own order, channels first: S2-MLP's and ShiftViT's."""
    one, two = x[:, :4], x[:, 4:]
    return torch.cat([functional.pad(one, (1, 0))[..., :-1], functional.pad(two, (0, 0, 0, 2))[:, :, 2:]], 1)


def mirrored(net: Maps, x: Tensor) -> Tensor:
    """Half of the channels run backwards."""
    return torch.cat([functional.pad(x[:, :4], (1, 0))[..., :-1], x[:, 4:].flip(3)[:, :, :4]], 1)


def wrapped(net: Maps, x: Tensor) -> Tensor:
    padded = functional.pad(x, (1, 0, 0, 0), mode="circular")
    return torch.cat([padded[:, :4, :, :-1], x[:, 4:, :, :4]], 1)


def shared(net: Maps, x: Tensor) -> Tensor:
    """A weight behind two shifts cannot be reordered."""
    weight = in_shift_order(net.two.weight, 3)
    one, two = cycle_shift(last(x), (1, 3)), cycle_shift(last(x), (3, 1))
    return first(functional.linear(one, weight) * functional.linear(two, weight))


@pytest.mark.parametrize(("body", "count"), [(cycle, 2), (joined, 1)])
def test_a_shift_is_one_convolution(body: Body, count: int) -> None:
    module, record = ran(body, SHIFTS)
    assert len(record.sites) == count
    assert not operators(module)["cat"] and not operators(module)["slice"] and not operators(module)["pad"]
    assert operators(module)["conv2d"] == 1 + count
    assert not ran(body, SHIFTS, SHIFTS)[1].sites
    assert not ran(body, SHIFTS, target="torch")[1].sites


@pytest.mark.parametrize(
    ("body", "reason"),
    [(unordered, "in another order"), (shared, "in another order"), (wrapped, None), (mirrored, None)],
)
def test_what_is_no_shift_of_this_kind_stays(body: Body, reason: str | None) -> None:
    module, record = ran(body, SHIFTS)
    assert not record.sites
    assert operators(module)["cat"] > 0
    assert [reason in refusal.reason for refusal in record.refusals.values()] == [True] * len(record.refusals)
    assert bool(record.refusals) == (reason is not None)


def mlp(net: Maps, x: Tensor) -> Tensor:
    return first(net.two(functional.gelu(net.one(last(x)))))


def gated(net: Maps, x: Tensor) -> Tensor:
    """CycleMLP's: branches in channels last, weighted for each image and channel, summed."""
    a, b = net.one(last(net.conv(x))), net.two(last(x))
    share = net.gate((a + b).mean((1, 2))).sigmoid().reshape(-1, 1, 1, 8)
    return first(a * share + b * (1 - share))


def normed(net: Maps, x: Tensor) -> Tensor:
    """A norm needs its channels last: the turn behind the Linears may as well stand before them."""
    return first(net.two(functional.gelu(net.one(net.norm(last(x))))))


def plain(net: Maps, x: Tensor) -> Tensor:
    """The same, and no bias that a convolution would add."""
    return first(net.two(functional.gelu(net.norm(last(x)))))


def biased(net: Maps, x: Tensor) -> Tensor:
    """Constants along the channels turn with them; the sum over places needs no turn."""
    y = net.one(last(x)) * net.norm.weight + net.norm.bias
    return x + y.mean((1, 2)).reshape(-1, 8, 1, 1)


def twice(net: Maps, x: Tensor) -> Tensor:
    """The weight is read twice, and both Linears stay."""
    return first(net.one(torch.tanh(net.one(last(x)))))


@pytest.mark.parametrize(("body", "left"), rest_slow([(mlp, 0), (gated, 0), (biased, 0), (normed, 2)], 2))
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
def test_linears_between_turns_are_convolutions(body: Body, left: int, target: str) -> None:
    before = operators(ran(body)[0])
    module, record = ran(body, CHANNELS_FIRST, target=target)
    after = operators(module)
    assert len(record.sites) == 1
    assert after["permute"] == left <= before["permute"]
    assert after["conv2d"] == before["conv2d"] + before["linear"] - after["linear"]
    assert not ran(body, CHANNELS_FIRST, CHANNELS_FIRST, target=target)[1].sites


@pytest.mark.parametrize("body", [plain, twice])
def test_what_would_move_no_less_stays(body: Body) -> None:
    assert not ran(body, CHANNELS_FIRST)[1].sites


def scaled(net: Maps, x: Tensor) -> Tensor:
    """torch's normalize: the norm of each place is expanded to all channels."""
    return functional.normalize(x, dim=1)


def repeated(net: Maps, x: Tensor) -> Tensor:
    """Nothing else has the result's shape, so that the expansion is what makes it."""
    return net.token.expand(x.shape[0], -1, -1, -1) + x.mean((2, 3), keepdim=True)


def both(net: Maps, x: Tensor) -> Tensor:
    small = x.mean((2, 3), keepdim=True)
    return small.expand_as(x) * small.expand_as(x)


def test_operators_repeat_by_themselves() -> None:
    module, record = ran(scaled, EXPANDS)
    assert len(record.sites) == 1
    assert not operators(module)["expand"] and not operators(module)["expand_as"]
    assert not ran(scaled, EXPANDS, EXPANDS)[1].sites
    assert not ran(both, EXPANDS)[1].sites


def test_an_expansion_beside_the_whole_goes() -> None:
    module, record = ran(repeated, EXPANDS)
    assert len(record.sites) == 1 and not operators(module)["expand"]


def cut(net: Maps, x: Tensor) -> Tensor:
    one, two = x.reshape(-1, 2, 4, 4, 4).unbind(1)
    return torch.cat([one, torch.tanh(two)], 1)


def test_pieces_are_split() -> None:
    module, record = ran(cut, UNBINDS)
    assert len(record.sites) == 1 and not operators(module)["unbind"]
    assert operators(module)["split"] == 1
    assert not ran(cut, UNBINDS, UNBINDS)[1].sites
    assert not ran(cut, UNBINDS, target="torch")[1].sites


@pytest.mark.parametrize(
    "average",
    [
        lambda x: first(last(x).tanh().permute(0, 2, 1, 3)).mean((2, 3), keepdim=True),
        lambda x: last(x).mean((1, 2)).reshape(-1, 8, 1, 1),
        lambda x: functional.adaptive_avg_pool2d(first(last(x).flip(1).tanh()), 1),
        lambda x: x.transpose(1, 2).mean((1, 3)).reshape(-1, 8, 1, 1),
    ],
)
def test_averages_come_before_permutations(average: Callable[[Tensor], Tensor]) -> None:
    before = operators(ran(lambda net, x: average(x))[0])
    module, record = ran(lambda net, x: average(x), MEANS)
    assert len(record.sites) == 1
    assert (
        operators(module)["permute"] + operators(module)["transpose"]
        < before["permute"] + before["transpose"]
    )


def test_an_average_of_parts_stays() -> None:
    def halves(net: Maps, x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(first(last(x).tanh()), 2)

    assert not ran(halves, MEANS)[1].sites


def test_an_average_that_leaves_another_order_stays() -> None:
    _, record = ran(lambda net, x: x.permute(0, 3, 2, 1).mean((2,)).reshape(-1, 8, 4, 1), MEANS)
    (refusal,) = record.refusals.values()
    assert not record.sites and "another order" in refusal.reason
