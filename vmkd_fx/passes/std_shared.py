"""STD's tokens as a third party's code has them (github.com/devrimcavusoglu/std), `variant="third_party"`.

It departs from the paper: T teachers share one token MLP of each kind, which sees all T tokens at once and
whose single output is added to each of them, and tokens flow on from one position to the next, so that every
head sees the last position. Weights of that code give its numbers in this form; the default is the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vmkd_fx.errors import MatchError
from vmkd_fx.graph.parts import Anatomy, Block
from vmkd_fx.passes.heads.features import to_tokens
from vmkd_fx.passes.std_modules import StdConfig, TokenBlock, new_tokens


class SharedTokens(nn.Module):
    """The tokens of all T teachers at one position.

    Args:
        block: whose output they see.
        first: whether tokens start here; later positions go on with those of the one before.
    """

    def __init__(self, block: Block, config: StdConfig, first: bool) -> None:
        super().__init__()
        self.layout, self.prefix_tokens = block.layout, block.prefix_tokens
        self.lengths = config.lengths(block)
        spatial, channel = self.lengths
        self.spatial = new_tokens(config.heads, spatial) if first else None
        self.channel = new_tokens(channel, config.heads) if first else None
        sizes = block.tokens, block.channels
        self.blocks = nn.ModuleList(TokenBlock(*sizes, config, config.heads) for _ in range(config.blocks))

    def forward(
        self, z: torch.Tensor, before: Sequence[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """A block's output in its own layout, and each teacher's [T_S || T_C] (B, N + P) from the position
        before, to the same behind this one.
        """
        z = to_tokens(z, self.layout, self.prefix_tokens)
        spatial, channel = self._start(z) if before is None else self._split(before)
        for block in self.blocks:
            spatial, channel = block(z, spatial, channel)
        return torch.cat([spatial, channel.transpose(1, 2)], dim=2).unbind(1)

    def _start(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.spatial is not None and self.channel is not None
        return self.spatial.expand(z.shape[0], -1, -1), self.channel.expand(z.shape[0], -1, -1)

    def _split(self, before: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """T_S (B, T, N) and T_C (B, P, T)."""
        spatial, channel = torch.stack(list(before), dim=1).split(self.lengths, dim=2)
        return spatial, channel.transpose(1, 2)


def shared_blocks(known: Anatomy, config: StdConfig) -> list[Block]:
    """The blocks beside which shared tokens stand, each once and in their order.

    Raises:
        MatchError: they leave features of different shapes, between which no tokens can flow.
    """
    places = sorted({known.position(position) for position in config.positions})
    blocks = [known.blocks[place] for place in places]
    sizes = {(block.tokens, block.channels) for block in blocks}
    if len(sizes) > 1:
        raise MatchError(
            f"variant='third_party' hands tokens on from position to position, and {known.model} has "
            f"(tokens, channels) {sorted(sizes)} there; choose positions in one stage, or variant='paper'"
        )
    return blocks
