"""Blocks, layouts and token mixers, read from the graph and held against the numbers themselves."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from tests.models import FAMILIES, images, small
from vmkd_fx.errors import MatchError
from vmkd_fx.graph.anatomy import LOCATION_AXES, Anatomy, Branch
from vmkd_fx.graph.mixing import reshaped_axes
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import randomise_


@pytest.mark.parametrize(
    ("name", "blocks", "layout", "channels", "tokens", "prefix", "mixes"),
    [
        ("mixer_s16_224", 8, "NLC", 512, 196, 0, (True, False)),
        ("resmlp_12_224", 12, "NLC", 384, 196, 0, (True, False)),
        ("gmlp_ti16_224", 30, "NLC", 128, 196, 0, (True,)),
        ("deit_tiny_patch16_224", 12, "NLC", 192, 196, 1, (True, False)),
        ("deit_tiny_distilled_patch16_224", 12, "NLC", 192, 196, 2, (True, False)),
    ],
)
def test_mlps_and_vits(
    name: str, blocks: int, layout: str, channels: int, tokens: int, prefix: int, mixes: tuple[bool, ...]
) -> None:
    found = vx.anatomy(timm.create_model(name))
    assert len(found.blocks) == blocks
    assert [block.path for block in found.blocks] == [f"blocks.{index}" for index in range(blocks)]
    for block in found.blocks:
        facts = (block.layout, block.channels, block.tokens, block.prefix_tokens)
        assert facts == (layout, channels, tokens, prefix)
        assert tuple(branch.mixing.mixes for branch in block.branches) == mixes
        assert all(branch.norm for branch in block.branches)


@pytest.mark.parametrize(
    ("name", "layout"), [("convnext_atto", "NCHW"), ("swin_tiny_patch4_window7_224", "NLC")]
)
def test_stages(name: str, layout: str) -> None:
    model = timm.create_model(name)
    found = vx.anatomy(model)
    assert {block.layout for block in found.blocks} == {layout}
    stages = [info["num_chs"] for info in model.feature_info]
    assert sorted({block.channels for block in found.blocks}) == stages


@pytest.mark.parametrize("family", FAMILIES)
def test_mixing_is_what_a_perturbed_location_shows(family: str) -> None:
    """Change one location at the entry of a branch's body and look whether another location moves at its
    end.
    """
    module = vx.trace(randomise_(small(family).eval())).eval().double()
    branches = [(block, branch) for block in vx.anatomy(module).blocks for branch in block.branches]
    assert branches
    for block, branch in branches:
        assert branch.mixing.mixes == _moves_others(module, branch, LOCATION_AXES[block.layout])


def _moves_others(module: TracedModule, branch: Branch, axes: frozenset[int]) -> bool:
    entry, end = branch.norm or branch.stream, branch.end
    values = _Values(module)
    x = images(size=module.info.need_input_size()[1], dtype=torch.float64)
    before = values.run(x)
    where = tuple(slice(None) if axis not in axes else slice(1, 2) for axis in range(before[entry].ndim))
    pushed = before[entry].clone()
    pushed[where] += 1.0
    after = values.run(x, {entry: pushed})
    moved = (after[end] - before[end]).abs()
    moved[where] = 0
    return bool(moved.amax() > 1e-9)


class _Values(torch.fx.Interpreter):
    """Runs a graph, keeps every value, and puts given values in place of some."""

    def run(self, x: torch.Tensor, given: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        self.given, self.kept = given or {}, {}
        with torch.no_grad():
            super().run(x)
        return self.kept

    def run_node(self, n: torch.fx.Node) -> object:
        value = self.given.get(n.name)
        value = super().run_node(n) if value is None else value
        if isinstance(value, torch.Tensor):
            self.kept[n.name] = value
        return value


def test_names_decide_nothing() -> None:
    renamed = type("Anything", (type(small("mixer")),), {})
    model = small("mixer")
    for part in model.modules():
        if type(part).__name__ == "MixerBlock":
            part.__class__ = type("Whatever", (type(part),), {})
    model.__class__ = renamed
    assert vx.anatomy(model).blocks == vx.anatomy(small("mixer")).blocks


@pytest.mark.parametrize("way", ["pickle", "lower"])
def test_a_graph_that_lost_its_calls_is_still_understood(way: str) -> None:
    model = small("deit")
    graph = pickle.loads(pickle.dumps(vx.trace(model))) if way == "pickle" else vx.lower(model)
    found, expected = vx.anatomy(graph), vx.anatomy(model)
    assert [block.path for block in found.blocks] == [block.path for block in expected.blocks]
    assert [block.tokens for block in found.blocks] == [block.tokens for block in expected.blocks]


@pytest.mark.parametrize(
    ("name", "blocks", "channels", "tokens"),
    [("poolformerv2_s12", 12, 512, 49), ("davit_tiny", 12, 768, 49), ("edgenext_xx_small", 12, 168, 64)],
)
def test_the_last_block_of_mixed_layouts(name: str, blocks: int, channels: int, tokens: int) -> None:
    found = vx.anatomy(timm.create_model(name))
    assert (len(found.blocks), found.blocks[-1].channels, found.blocks[-1].tokens) == (
        blocks,
        channels,
        tokens,
    )


def test_a_place_counted_from_an_end_that_is_not_reached_is_refused() -> None:
    found = vx.anatomy(timm.create_model("tiny_vit_5m_224"))
    with pytest.raises(MatchError, match="leaves 64 channels while the classifier reads 320"):
        found.position(-1)
    assert found.position(1) == 1


def test_looking_leaves_the_random_numbers_alone() -> None:
    model = small("deit")
    before = torch.get_rng_state()
    vx.anatomy(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_prints_as_a_table() -> None:
    text = str(vx.anatomy(small("deit")))
    assert "2 blocks, 10 classes" in text
    assert "blocks.0 to blocks.1" in text
    assert "mixes tokens (attention), channels only" in text


def test_positions() -> None:
    found = vx.anatomy(timm.create_model("mixer_s16_224"))
    assert [found.position(where) for where in (0, -1, "-1", "7", "1/2", "2/3", "1/1")] == [
        0,
        7,
        7,
        7,
        3,
        4,
        7,
    ]


@pytest.mark.parametrize("where", [8, -9, "9/8", "end", "1/0", "0/2"])
def test_a_position_that_does_not_exist(where: int | str) -> None:
    found = vx.anatomy(timm.create_model("mixer_s16_224"))
    with pytest.raises(MatchError, match="it has 8, so 0 to 7"):
        found.position(where)


def test_a_model_without_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(10))
    model(images())
    found = vx.anatomy(vx.trace(model, input_size=(3, 32, 32)))
    assert isinstance(found, Anatomy)
    assert not found.blocks
    with pytest.raises(MatchError, match="no residual blocks"):
        found.position(-1)


@pytest.mark.parametrize(
    ("before", "after", "axes", "expected"),
    [
        ((2, 16, 24), (2, 4, 4, 24), {1}, {1, 2}),
        ((2, 4, 4, 24), (2, 16, 24), {1, 2}, {1}),
        ((2, 16, 24), (2, 16, 3, 8), {1}, {1}),
        ((2, 16, 3, 2, 4), (2, 16, 24), {1}, {1}),
        ((2, 24, 4, 4), (2, 24, 16), {2, 3}, {2}),
        ((2, 16, 24), (2, 384), {1}, {1}),
    ],
)
def test_axes_through_a_reshape(before: tuple, after: tuple, axes: set, expected: set) -> None:
    assert reshaped_axes(before, after, frozenset(axes)) == expected
