"""Features of the student brought to a teacher's width, as outputs, and out again: FitNet's hint, MGD's
generated feature and module imitation's projected ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn

from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.edit import Injection
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.passes.heads.features import to_map, to_tokens
from vmkd_fx.passes.heads.projections import FitNetProjection, MGDGenerator

FITNET, MGD = "fitnet", "mgd"


@dataclass(frozen=True)
class FitNetConfig:
    """The block that learns from the hint, and the teacher's width there."""

    position: int | str
    dim: int


@dataclass(frozen=True)
class MgdConfig:
    """The teacher's width at its last block, the student's grid there, the share of what is masked and along
    what: "channels" (classification) or "locations".
    """

    dim: int
    grid: tuple[int, int]
    ratio: float = 0.15
    along: str = "channels"


class TokenHint(nn.Module):
    """A feature in its own layout to patch tokens of another width (B, N, D)."""

    def __init__(self, channels: int, dim: int, layout: str, prefix_tokens: int) -> None:
        super().__init__()
        self.layout, self.prefix_tokens = layout, prefix_tokens
        self.projection = FitNetProjection(channels, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(to_tokens(x, self.layout, self.prefix_tokens))


class MapGenerator(nn.Module):
    """A feature in its own layout, partly masked, to a generated map (B, D, H, W)."""

    def __init__(self, channels: int, config: MgdConfig, layout: str, prefix_tokens: int) -> None:
        super().__init__()
        self.grid, self.layout, self.prefix_tokens = config.grid, layout, prefix_tokens
        self.generator = MGDGenerator(channels, config.dim, config.ratio, config.along)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.generator(to_map(x, self.layout, self.grid, self.prefix_tokens))


def inject_fitnet(module: TracedModule, config: FitNetConfig, known: Anatomy | None = None) -> TracedModule:
    """Add the output `fitnet/hint` (B, N, D_teacher); `strip` takes it out."""
    known = known or anatomy(module)
    block = known.blocks[known.position(config.position)]
    head = TokenHint(block.channels, config.dim, block.layout, block.prefix_tokens)
    return _inject(module, FITNET, asdict(config), "hint", head, block.output)


def inject_mgd(module: TracedModule, config: MgdConfig, known: Anatomy | None = None) -> TracedModule:
    """Add the output `mgd/generated` (B, D_teacher, H, W); `strip` takes it out."""
    known = known or anatomy(module)
    last = known.blocks[known.position(-1)]
    head = MapGenerator(last.channels, config, last.layout, last.prefix_tokens)
    return _inject(module, MGD, asdict(config), "generated", head, known.final)


def _inject(
    module: TracedModule, name: str, config: dict[str, object], output: str, head: nn.Module, place: str
) -> TracedModule:
    module = fork(module, to_edit=True)
    injection = Injection(module, name, config)
    node = next(node for node in module.graph.nodes if node.name == place)
    injection.emit(output, injection.call(output, head.to(reference_tensor(module)), node, after=node))
    return injection.finish()
