"""Constants, views, class tokens and rolls: the same numbers from fewer operators."""

from __future__ import annotations

from itertools import permutations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models import small
from tests.passes.lowering import lowered_by, operators
from vmkd_fx.passes.cleanup.axes import movement, permuted, reshaped, source_layout
from vmkd_fx.passes.cleanup.constants import CONSTANTS
from vmkd_fx.passes.cleanup.prefix_tokens import PREFIX_TOKENS
from vmkd_fx.passes.cleanup.rolls import ROLLS
from vmkd_fx.passes.cleanup.views import VIEWS, is_view
from vmkd_fx.passes.cleanup.wide import MOST_AXES


class Net(nn.Module):
    """A stem to (B, 8, 4, 4), a body, and a head over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 17, 8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


class Windows(Net):
    def body(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1).view(b, h // 2, 2, w // 2, 2, c)
        x = x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 2, 2, c).view(-1, 4, c)
        x = torch.tanh(x)
        x = x.view(-1, 2, 2, c).view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        return x.contiguous().view(b, h, w, c).flatten(1, 2).mean(1)


class ThereAndBack(Net):
    def body(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return tokens.transpose(1, 2).reshape(x.shape).unsqueeze(1).squeeze(1)[:, :, 0:].mean((2, 3))


class Shuffled(Net):
    def body(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return torch.tanh(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)).mean((2, 3))


class Unrolled(Net):
    """Three levels of 2 x 2 neighbours in a row, as Hiera orders its tokens: ten axes in one chain."""

    def body(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, (16, 8)).permute(0, 2, 3, 1)
        for level in range(3):
            h, w, c = (16 >> level, 8 >> level, x.shape[-1])
            x = x.reshape(-1, h // 2, 2, w // 2, 2, c).permute(0, 2, 4, 1, 3, 5)
            x = x.reshape(-1, h // 2, w // 2, c)
        return self.order(x.reshape(-1, 128, 8))

    def order(self, tokens: Tensor) -> Tensor:
        return (tokens * torch.arange(128.0).to(tokens)[:, None]).mean(1)


class UnrolledLevels(Unrolled):
    """The same with the levels before the batch: the batch moves too, and no list of places holds that."""

    def body(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, (16, 8)).permute(0, 2, 3, 1)
        for level in range(3):
            h, w, c = (16 >> level, 8 >> level, x.shape[-1])
            x = x.reshape(-1, h // 2, 2, w // 2, 2, c).permute(2, 4, 0, 1, 3, 5)
            x = x.reshape(-1, h // 2, w // 2, c)
        x = torch.tanh(x.reshape(64, -1, 2, 1, 8)).permute(1, 0, 2, 3, 4)
        return self.order(x.reshape(-1, 128, 8))


class BatchInside(Net):
    """The batch is not the outer factor of an axis that it is part of."""

    def body(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = torch.tanh(x.permute(2, 0, 3, 1).reshape(h * b, w, c))
        return y.reshape(h, b, w, c).permute(1, 0, 2, 3).mean((1, 2))


class ReadTwice(Net):
    """A view in the middle of a chain is read by itself."""

    def body(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return flat.transpose(1, 2).mean(1) + torch.tanh(flat).mean(2)


@pytest.mark.parametrize(("make", "gathers"), [(Unrolled, 1), (UnrolledLevels, 0)])
def test_no_view_has_more_axes_than_an_engine_takes(make: type[Net], gathers: int) -> None:
    error, module, _ = lowered_by(make(), VIEWS, size=(3, 32, 32))
    assert error <= 1e-12
    assert operators(module)["index_select"] == gathers
    steps = [node.args[1] for node in module.graph.nodes if is_view(node)]
    assert steps and max(len(step) for step in steps) <= MOST_AXES  # type: ignore[arg-type]
    assert lowered_by(make(), VIEWS, VIEWS)[2].sites == []


@pytest.mark.parametrize(
    ("make", "views"),
    [(Windows, 6), (ThereAndBack, 0), (Shuffled, 3), (BatchInside, 4), (ReadTwice, 2)],
)
def test_a_chain_of_views_takes_the_fewest_steps(make: type[Net], views: int) -> None:
    error, module, _ = lowered_by(make(), VIEWS)
    assert error == 0
    found = operators(module)
    assert found["reshape"] + found["permute"] <= views
    assert set(found) <= {"conv2d", "reshape", "permute", "tanh", "mean", "linear", "add"}, (
        "no sizes, no slices"
    )
    _, again, record = lowered_by(make(), VIEWS, VIEWS)
    assert not record.sites
    assert again.code == module.code


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_movement_is_the_chain_that_it_stands_for(data: st.DataObject) -> None:
    """Random reshapes and permutations of (B, 4, 6, 3), for two batches."""
    for_batch = {2: torch.arange(2 * 72), 3: torch.arange(3 * 72)}
    values = {batch: numbers.reshape(batch, 4, 6, 3) for batch, numbers in for_batch.items()}
    lengths = source = [(1, True), (4, False), (6, False), (3, False)]
    layout = source_layout(source)
    chain = dict(values)
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            order = data.draw(st.sampled_from(list(permutations(range(len(lengths))))))
            lengths, layout = [lengths[axis] for axis in order], permuted(layout, order)
            chain = {batch: value.permute(order) for batch, value in chain.items()}
            continue
        place = data.draw(st.integers(0, len(lengths) - 1))
        (number, batched), divisor = lengths[place], data.draw(st.sampled_from([1, 2, 3]))
        if data.draw(st.booleans()) and place + 1 < len(lengths):
            other, also = lengths[place + 1]
            lengths = [*lengths[:place], (number * other, batched or also), *lengths[place + 2 :]]
        elif number % divisor == 0:
            lengths = [
                *lengths[:place],
                (number // divisor, batched),
                (divisor, False),
                *lengths[place + 1 :],
            ]
        found = reshaped(layout, lengths)
        if found is None:
            return
        layout = found[0]
        shapes = {batch: [n * batch if b else n for n, b in lengths] for batch in chain}
        chain = {batch: value.reshape(shapes[batch]) for batch, value in chain.items()}
    found_movement = movement(source, layout, lengths)
    for batch, value in values.items():
        if found_movement.into is not None:
            value = value.reshape(found_movement.into)
        if found_movement.order is not None:
            value = value.permute(found_movement.order)
        if found_movement.out_of is not None:
            value = value.reshape(found_movement.out_of)
        assert torch.equal(value, chain[batch])


class WithToken(Net):
    def body(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + self.position
        return torch.tanh(tokens)[:, 0] + tokens.mean(1)


class TokensAround(Net):
    def body(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        token = self.token.expand(x.shape[0], -1, -1)
        return torch.tanh(torch.cat([token, token * 2, tokens, token], 1)).mean(1)


class JoinedBatch(Net):
    def body(self, x: Tensor) -> Tensor:
        tokens = torch.cat([x.flatten(2).transpose(1, 2), self.position[:, 1:]], 0)
        return tokens.mean(1)[:-1]


@pytest.mark.parametrize(("make", "sites"), [(WithToken, 1), (TokensAround, 0), (JoinedBatch, 0)])
def test_class_tokens_need_no_batch(make: type[Net], sites: int) -> None:
    error, module, record = lowered_by(make(), PREFIX_TOKENS)
    assert error < 1e-15
    assert len(record.sites) == sites
    if sites:
        assert not operators(module)["cat"]
        assert operators(module)["pad"] == 1
        assert operators(module)["add"] == 2, "the token is part of the position embedding"


@pytest.mark.parametrize("options", [{"dims": (2, 3), "shifts": (1, -1)}, {"dims": (3,), "shifts": (2,)}])
def test_rolls_are_gathers(options: dict) -> None:
    class Rolled(Net):
        def body(self, x: Tensor) -> Tensor:
            return (torch.roll(x, **options) * self.position[0, :16, 0].view(4, 4)).mean((2, 3))

    error, module, _ = lowered_by(Rolled(), ROLLS)
    assert error == 0
    assert (operators(module)["roll"], operators(module)["index_select"]) == (0, 1)


def test_a_roll_of_the_batch_stays() -> None:
    class Rolled(Net):
        def body(self, x: Tensor) -> Tensor:
            return torch.roll(x, 1, 0).mean((2, 3))

    _, module, record = lowered_by(Rolled(), ROLLS)
    assert operators(module)["roll"] == 1
    assert "neighbours of fixed length" in next(iter(record.refusals.values())).reason


def test_constants_are_computed_once() -> None:
    class Biased(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.randint(0, 17, (4, 4)))

        def body(self, x: Tensor) -> Tensor:
            bias = (
                self.position[0][self.index.view(-1)].view(4, 4, 8).permute(2, 0, 1).contiguous().unsqueeze(0)
            )
            noise = torch.zeros(8).unsqueeze(-1).expand(8, 16).reshape(8, 4, 4)
            return torch.tanh(x + bias + noise).mean((2, 3))

    error, module, _ = lowered_by(Biased(), CONSTANTS)
    assert error == 0
    assert set(operators(module)) == {"conv2d", "add", "tanh", "mean", "linear"}


@pytest.mark.slow
def test_swin_loses_its_arithmetic_on_shapes() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=10,
    )
    error, module, _ = lowered_by(model, ROLLS, VIEWS, size=(3, 64, 64))
    assert error < 1e-13
    found = operators(module)
    assert not {"sym_size", "slice", "pad", "roll"} & set(found)
    assert not [name for name in found if "built-in" in name and "getitem" not in name]


@pytest.mark.parametrize("family", ["deit", "mixer", "poolformer"])
def test_families(family: str) -> None:
    error, module, _ = lowered_by(small(family), PREFIX_TOKENS, ROLLS, VIEWS)
    assert error < 1e-13
    assert not operators(module)["sym_size"]
