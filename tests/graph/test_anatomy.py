"""Blocks, layouts and token mixers, read from the graph and held against the numbers themselves."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from tests.models import FusedAffineBlock, small
from tests.slow import rest_slow
from vmkd_fx.errors import MatchError
from vmkd_fx.graph.parts import Anatomy


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
    ("name", "layout"), [("convnext_atto", "NCHW"), ("swin_tiny_patch4_window7_224", "NHWC")]
)
def test_stages(name: str, layout: str) -> None:
    model = timm.create_model(name)
    found = vx.anatomy(model)
    assert {block.layout for block in found.blocks} == {layout}
    stages = [info["num_chs"] for info in model.feature_info]
    assert [stage.channels for stage in found.stages] == stages
    assert [stage.path for stage in found.stages] == [info["module"] for info in model.feature_info]
    assert [i for stage in found.stages for i in range(stage.first, stage.last + 1)] == list(
        range(len(found.blocks))
    )


def test_names_decide_nothing() -> None:
    renamed = type("Anything", (type(small("mixer")),), {})
    model = small("mixer")
    for part in model.modules():
        if type(part).__name__ == "MixerBlock":
            part.__class__ = type("Whatever", (type(part),), {})
    model.__class__ = renamed
    assert vx.anatomy(model).blocks == vx.anatomy(small("mixer")).blocks


def test_a_graph_that_lost_its_calls_is_still_understood() -> None:
    model = small("deit")
    graph = pickle.loads(pickle.dumps(vx.trace(model)))
    found, expected = vx.anatomy(graph), vx.anatomy(model)
    assert [block.path for block in found.blocks] == [block.path for block in expected.blocks]
    assert [block.tokens for block in found.blocks] == [block.tokens for block in expected.blocks]


@pytest.mark.parametrize(
    ("name", "blocks", "channels", "tokens"),
    rest_slow(
        [("poolformerv2_s12", 12, 512, 49), ("davit_tiny", 12, 768, 49), ("edgenext_xx_small", 12, 168, 64)]
    ),
)
def test_the_last_block_of_mixed_layouts(name: str, blocks: int, channels: int, tokens: int) -> None:
    found = vx.anatomy(timm.create_model(name))
    assert (len(found.blocks), found.blocks[-1].channels, found.blocks[-1].tokens) == (
        blocks,
        channels,
        tokens,
    )


@pytest.mark.parametrize(
    ("name", "blocks", "first", "shortcuts"),
    [
        ("resnet18", 8, "layer1.0", ("identity",) * 2 + ("projection", "identity") * 3),
        ("test_efficientnet", 4, "blocks.1.0", ("none",) * 4),
        ("ese_vovnet19b_slim_dw", 4, "stages.0.blocks.0", ("none",) * 4),
        ("densenet121", 4, "features.denseblock1", ("none",) * 4),
        ("convmixer_768_32", 32, "blocks.0", ("identity",) * 32),
        ("vgg11", 8, "features.0", ("none",) * 8),
    ],
)
def test_blocks_with_other_shortcuts(name: str, blocks: int, first: str, shortcuts: tuple[str, ...]) -> None:
    with torch.device("meta"):
        found = vx.anatomy(timm.create_model(name))
    assert len(found.blocks) == blocks
    assert found.blocks[0].path == first
    assert tuple(block.branches[0].shortcut for block in found.blocks) == shortcuts


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("fastvit_t8", "stages.1.downsample.proj.0", "joins without a shortcut beside residual blocks"),
        ("cait_xxs24_224", "blocks_token_only.0", "works on prefix tokens alone"),
        ("xcit_nano_12_p8_224", "cls_attn_blocks.0", "class attention behind the blocks"),
        ("vitamin_small_224", "patch_embed.backbone.stages.0.0", "inside the stem"),
        ("twins_svt_small", "pos_block.0", "next to nothing beside other blocks"),
        ("levit_128s", "stages.1", "around other blocks"),
    ],
)
def test_what_looks_like_a_block_is_left_out_with_the_reason(name: str, path: str, reason: str) -> None:
    with torch.device("meta"):
        found = vx.anatomy(timm.create_model(name))
    assert dict(found.left_out)[path] == reason
    assert path not in [block.path for block in found.blocks]


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("deit_tiny_distilled_patch16_224", {2}),
        ("cait_xxs24_224", {0}),
        ("convit_tiny", {0, 1}),
        ("pit_ti_224", {1}),
        ("crossvit_tiny_240", {1}),
        ("vit_tiny_patch16_dinov3_qkvb", {5}),
    ],
)
def test_prefix_tokens_come_from_the_graph(name: str, prefixes: set[int]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    model.num_prefix_tokens = 3
    found = vx.anatomy(model)
    assert {block.prefix_tokens for block in found.blocks} == prefixes
    assert all(round(block.tokens**0.5) ** 2 == block.tokens for block in found.blocks)


class Behind(nn.Module):
    """A residual block, and behind it a module whose forward decides by the number of images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList([FusedAffineBlock(8)])
        self.late = Deciding()
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.late(x).mean((2, 3)))


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.shape[0] > 2 else x


def test_a_place_counted_from_an_end_that_is_not_reached_is_refused() -> None:
    found = vx.anatomy(vx.trace(Behind(), input_size=(3, 32, 32)))
    with pytest.raises(MatchError, match=r"behind the last block found, blocks\.0, late is closed"):
        found.position(-1)
    assert found.position(0) == 0


def test_looking_leaves_the_random_numbers_alone() -> None:
    model = small("deit")
    before = torch.get_rng_state()
    vx.anatomy(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_prints_as_a_table() -> None:
    text = str(vx.anatomy(small("deit")))
    assert "2 blocks in 1 stages, 10 classes" in text
    assert "blocks.0 to blocks.1" in text
    assert "mixes tokens (attention); channels only" in text


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
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    found = vx.anatomy(vx.trace(model, input_size=(3, 32, 32)))
    assert isinstance(found, Anatomy)
    assert not found.blocks
    with pytest.raises(MatchError, match="has no blocks"):
        found.position(-1)


def test_lengths_that_are_read_later_do_not_open_a_residual_sum() -> None:
    """MViT hands the size of its grid from block to block, beside the tokens."""
    with torch.device("meta"):
        found = vx.anatomy(timm.create_model("mvitv2_tiny"))
    first_of_stage = [found.blocks[stage.first].branches[0] for stage in found.stages[1:]]
    assert [(branch.shortcut, branch.layout) for branch in first_of_stage] == [("projection", "NLC")] * 3
