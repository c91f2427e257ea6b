"""Spatial and channel distillation tokens beside chosen blocks, and out again (STD).

Into a block's output Z (P patches, N channels) a pair of tokens looks, a spatial T_S (1, N) and a channel T_C
(P, 1):

    T_S(k) = W2 σ(W1 LN([Z || T_S(k-1)])) + T_S(k-1)      along the patches, each channel alone    (STD Eq. 3
    and 5) T_C(k) = W4 σ(W3 LN([Z || T_C(k-1)])) + T_C(k-1)      along the channels, each patch alone     (STD
    Eq. 4 and 6)

for k = 1..K; [T_S(K) || T_C(K)] feeds one distillation head a teacher. Nothing flows back into Z, so taking
the branch out leaves the student's own function bit for bit as it is: that is the inverse, `strip`.

The readings that reproduce STD table 2: one pair, its own MLPs and head for each teacher, d_S = N/2, d_C =
4N, biases everywhere, Z as the block leaves it (before the final norm).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import nn

from vmkd_fx.errors import MatchError, RecipeError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.edit import LOGITS, Injection, drop_dead_nodes, named_outputs, set_outputs
from vmkd_fx.graph.parts import Anatomy, Block
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.values import reference_tensor

NAME = "std"


@dataclass(frozen=True)
class StdConfig:
    """Settings of the tokens.

    Attributes:
        positions: for each teacher the block whose output its tokens see: an index, or a share of the depth
            ("2/3").
        blocks: K, token blocks in a row; the paper does not print it, its sizes fit 1.
        spatial_ratio, channel_ratio: hidden widths d_S = spatial_ratio * N and d_C = channel_ratio * N.
    """

    positions: tuple[int | str, ...] = (-1,)
    blocks: int = 1
    spatial_ratio: float = 0.5
    channel_ratio: float = 4.0

    def __post_init__(self) -> None:
        if not self.positions:
            raise RecipeError(
                "STD needs a position for each teacher and got none; for one teacher at the end: (-1,)"
            )
        if self.blocks < 1:
            raise RecipeError(f"STD needs at least one token block, got blocks={self.blocks}")
        if self.spatial_ratio <= 0 or self.channel_ratio <= 0:
            raise RecipeError(
                f"hidden widths must be positive, got {self.spatial_ratio} and {self.channel_ratio}"
            )


class TokenMlp(nn.Module):
    """LN, Linear, GELU and a Linear to one output, along the last axis: (B, M, L) to (B, M, 1)."""

    def __init__(self, length: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(length, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TokenBlock(nn.Module):
    """One step k of Eq. 5 and 6: both tokens look at Z once."""

    def __init__(self, patches: int, channels: int, spatial_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm_spatial = nn.LayerNorm(channels)
        self.mlp_spatial = TokenMlp(patches + 1, spatial_hidden)
        self.norm_channel = nn.LayerNorm(channels + 1)
        self.mlp_channel = TokenMlp(channels + 1, channel_hidden)

    def forward(
        self, z: torch.Tensor, spatial: torch.Tensor, channel: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Z (B, P, N), T_S (B, 1, N) and T_C (B, P, 1) to the next T_S and T_C."""
        patches = self.norm_spatial(torch.cat([z, spatial], dim=1)).transpose(1, 2)
        channels = self.norm_channel(torch.cat([z, channel], dim=2))
        return spatial + self.mlp_spatial(patches).transpose(1, 2), channel + self.mlp_channel(channels)


class SpatialChannelTokens(nn.Module):
    """A pair of tokens and its K blocks: a block's output in its own layout to [T_S || T_C] (B, N + P)."""

    def __init__(self, block: Block, config: StdConfig) -> None:
        super().__init__()
        patches, channels = block.tokens, block.channels
        self.layout = block.layout
        self.prefix_tokens = block.prefix_tokens
        self.spatial = nn.Parameter(torch.empty(1, channels))
        self.channel = nn.Parameter(torch.empty(patches, 1))
        nn.init.trunc_normal_(self.spatial, std=0.02)
        nn.init.trunc_normal_(self.channel, std=0.02)
        hidden = max(1, int(config.spatial_ratio * channels)), max(1, int(config.channel_ratio * channels))
        self.blocks = nn.ModuleList(TokenBlock(patches, channels, *hidden) for _ in range(config.blocks))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if self.layout == "NCHW":
            z = z.flatten(2).transpose(1, 2)
        elif self.layout == "NHWC":
            z = z.flatten(1, 2)
        elif self.prefix_tokens:
            z = z[:, self.prefix_tokens :]
        spatial = self.spatial.expand(z.shape[0], -1, -1)
        channel = self.channel.expand(z.shape[0], -1, -1)
        for block in self.blocks:
            spatial, channel = block(z, spatial, channel)
        return torch.cat([spatial.squeeze(1), channel.squeeze(2)], dim=1)


def inject_std_tokens(module: TracedModule, config: StdConfig, known: Anatomy | None = None) -> TracedModule:
    """Add one pair of tokens and one distillation head for each position. `known` is the module's anatomy,
    where it is at hand.

    Returns:
        A graph over the same student with outputs `logits` and `std/0`, `std/1`, ... each (B, classes).

    Raises:
        MatchError: the model has no such block, or its blocks hold no tokens.
    """
    known = known or anatomy(module)
    blocks = blocks_with_tokens(known, config)
    module = fork(module)
    injection = Injection(module, NAME, asdict(config))
    nodes = {node.name: node for node in module.graph.nodes}
    reference = reference_tensor(module)
    for teacher, block in enumerate(blocks):
        with reference.device:
            tokens = SpatialChannelTokens(block, config).to(reference.dtype)
            head = nn.Linear(block.channels + block.tokens, known.num_classes, dtype=reference.dtype)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        seen = injection.call(
            f"teacher_{teacher}.tokens", tokens, nodes[block.output], after=nodes[block.output]
        )
        injection.emit(str(teacher), injection.call(f"teacher_{teacher}.head", head, seen, after=seen))
    return injection.finish()


def predicted(outputs: Mapping[str, torch.Tensor], predict: str) -> torch.Tensor:
    """The logits (B, C) that a student's outputs stand for (STD table 6).

    "class" is the class head, "dist" the mean of the distillation heads, "mean" the average of the two;
    without heads all three are the class head.
    """
    heads = [value for name, value in outputs.items() if name.startswith(f"{NAME}/")]
    if predict == "class" or not heads:
        return outputs[LOGITS]
    mean = torch.stack(heads).mean(0)
    return mean if predict == "dist" else (outputs[LOGITS] + mean) / 2


def keep_as_prediction(module: TracedModule, predict: str) -> TracedModule:
    """Turn the heads into one prediction instead of taking them out (STD table 6).

    `predict` is "dist", the mean of the distillation heads, or "mean", the average of that and the class
    head. The result is a new graph with one bare output of logits.
    """
    module = fork(module)
    outputs = named_outputs(module)
    heads = [node for name, node in outputs.items() if name.startswith(f"{NAME}/")]
    if not heads:
        raise MatchError(
            f"predict={predict!r} needs distillation heads, and {module.info.name} has none; use 'class'"
        )
    graph = module.graph
    with graph.inserting_before(next(node for node in graph.nodes if node.op == "output")):
        prediction = heads[0]
        for head in heads[1:]:
            prediction = graph.call_function(operator.add, (prediction, head))
        if len(heads) > 1:
            prediction = graph.call_function(operator.truediv, (prediction, len(heads)))
        if predict == "mean":
            prediction = graph.call_function(operator.add, (prediction, outputs[LOGITS]))
            prediction = graph.call_function(operator.truediv, (prediction, 2))
    set_outputs(module, {"": prediction})
    module.meta["receipts"] = ()
    drop_dead_nodes(module)
    module.recompile()
    return module


def blocks_with_tokens(known: Anatomy, config: StdConfig) -> list[Block]:
    """The block for each position.

    Raises:
        MatchError: there is no such block, or it holds no tokens.
    """
    blocks = [known.blocks[known.position(position)] for position in config.positions]
    for block, position in zip(blocks, config.positions, strict=True):
        if block.tokens < 2:
            raise MatchError(
                f"STD asks for token features after block {position!r}, but {block.path} of {known.model} "
                f"leaves {block.tokens} patch tokens of {block.channels} channels; choose an earlier one"
            )
    return blocks
