"""STD's tokens as modules, and their settings (Eq. 3 to 6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vmkd_fx.errors import RecipeError, UnknownNameError
from vmkd_fx.graph.parts import Block
from vmkd_fx.passes.heads.features import to_tokens
from vmkd_fx.passes.heads.statistics import VARIANTS

TOKENS = ("both", "spatial", "channel")


@dataclass(frozen=True)
class StdConfig:
    """Settings of the tokens.

    Attributes:
        positions: for each teacher the block whose output its tokens see: an index, or a share of the depth
            ("2/3").
        blocks: K, token blocks in a row; the paper does not print it, its sizes fit 1.
        spatial_ratio, channel_ratio: hidden widths d_S = spatial_ratio * N and d_C = channel_ratio * N.
        tokens: "both", or "spatial" or "channel" alone for the ablations.
        information: whether a statistics network measures what the two kinds share (Eq. 7 to 9).
        variant: "paper", or "third_party", see `vmkd_fx.passes.std_shared`.
        teachers: how many heads there are; None is one for each position, and only "third_party" knows
            others.
    """

    positions: tuple[int | str, ...] = (-1,)
    blocks: int = 1
    spatial_ratio: float = 0.5
    channel_ratio: float = 4.0
    tokens: str = "both"
    information: bool = False
    variant: str = "paper"
    teachers: int | None = None

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
        for name, value, known in (("tokens", self.tokens, TOKENS), ("variant", self.variant, VARIANTS)):
            if value not in known:
                raise UnknownNameError(name, str(value), known)
        self._check_tokens()

    def _check_tokens(self) -> None:
        if self.tokens != "both" and self.information:
            raise RecipeError(
                "mutual information is measured between spatial and channel tokens, and "
                f"tokens={self.tokens!r} leaves one kind; take tokens='both', or information=0"
            )
        if self.tokens != "both" and self.variant != "paper":
            raise RecipeError(f"variant={self.variant!r} knows tokens='both' alone, got {self.tokens!r}")
        if self.heads < 1 or (self.variant == "paper" and self.heads != len(self.positions)):
            raise RecipeError(
                f"STD has a position for each teacher, got {self.positions} and teachers={self.teachers}; "
                "leave teachers out"
            )

    @property
    def heads(self) -> int:
        """How many teachers there are."""
        return len(self.positions) if self.teachers is None else self.teachers

    def lengths(self, block: Block) -> tuple[int, int]:
        """Lengths of the spatial and the channel token beside a block, 0 for a kind that is left out."""
        spatial, channel = self.tokens != "channel", self.tokens != "spatial"
        return block.channels * spatial, block.tokens * channel

    def hidden(self, channels: int) -> tuple[int, int]:
        """d_S and d_C."""
        return max(1, int(self.spatial_ratio * channels)), max(1, int(self.channel_ratio * channels))


class TokenMlp(nn.Module):
    """Linear, GELU and a Linear to one output, along the last axis: (B, M, L) to (B, M, 1)."""

    def __init__(self, length: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(length, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TokenBlock(nn.Module):
    """One step k of Eq. 5 and 6: the tokens look at Z once.

    Args:
        patches, channels: P and N of Z.
        config: kinds of tokens and hidden widths.
        tokens: T, how many tokens of each kind stand beside Z; all of them take the same step.
    """

    def __init__(self, patches: int, channels: int, config: StdConfig, tokens: int = 1) -> None:
        super().__init__()
        spatial_hidden, channel_hidden = config.hidden(channels)
        if config.tokens != "channel":
            self.norm_spatial = nn.LayerNorm(channels)
            self.mlp_spatial = TokenMlp(patches + tokens, spatial_hidden)
        if config.tokens != "spatial":
            self.norm_channel = nn.LayerNorm(channels + tokens)
            self.mlp_channel = TokenMlp(channels + tokens, channel_hidden)

    def forward(
        self, z: torch.Tensor, spatial: torch.Tensor | None, channel: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Z (B, P, N), T_S (B, T, N) and T_C (B, P, T) to the next T_S and T_C; None stays None."""
        if spatial is not None:
            patches = self.norm_spatial(torch.cat([z, spatial], dim=1)).transpose(1, 2)
            spatial = spatial + self.mlp_spatial(patches).transpose(1, 2)
        if channel is not None:
            channels = self.norm_channel(torch.cat([z, channel], dim=2))
            channel = channel + self.mlp_channel(channels)
        return spatial, channel


class SpatialChannelTokens(nn.Module):
    """A pair of tokens and its K blocks: a block's output in its own layout to [T_S || T_C] (B, N + P), or to
    T_S (B, N) or T_C (B, P) where that is the one kind.
    """

    def __init__(self, block: Block, config: StdConfig) -> None:
        super().__init__()
        self.layout, self.prefix_tokens = block.layout, block.prefix_tokens
        spatial, channel = config.lengths(block)
        self.spatial = new_tokens(1, spatial) if spatial else None
        self.channel = new_tokens(channel, 1) if channel else None
        steps = (TokenBlock(block.tokens, block.channels, config) for _ in range(config.blocks))
        self.blocks = nn.ModuleList(steps)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = to_tokens(z, self.layout, self.prefix_tokens)
        spatial, channel = (
            None if tokens is None else tokens.expand(z.shape[0], -1, -1)
            for tokens in (self.spatial, self.channel)
        )
        for block in self.blocks:
            spatial, channel = block(z, spatial, channel)
        return torch.cat([tokens.flatten(1) for tokens in (spatial, channel) if tokens is not None], dim=1)


def new_tokens(rows: int, columns: int) -> nn.Parameter:
    """Learnable tokens (rows, columns) near zero."""
    tokens = nn.Parameter(torch.empty(rows, columns))
    nn.init.trunc_normal_(tokens, std=0.02)
    return tokens
