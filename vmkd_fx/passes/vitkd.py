"""What ViTKD reads in the student and trains beside it, and out again (Yang et al., 2022).

The shallow features leave aligned to the teacher's width (Eq. 1), the last one, behind the final norm, leaves
as the teacher's that was generated from its unmasked tokens (Eq. 2 to 4), with the mask. Prefix tokens stay
out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch.fx import Node

from vmkd_fx.errors import MatchError, RecipeError, UnknownNameError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.edit import Injection
from vmkd_fx.graph.parts import Anatomy, Block
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.passes.heads.vitkd import GENERATORS, ViTKDGenerator, ViTKDMimic

NAME = "vitkd"
FEATURES = ("ffn", "mha")


@dataclass(frozen=True)
class VitKdConfig:
    """Settings of the heads.

    Attributes:
        shallow: indices of the blocks that mimic.
        shallow_dims: the teacher's width at each, or 0 where no alignment is needed (correlation matrices).
        deep_dim: the teacher's width behind its last block.
        grid: (height, width) of the student's patches.
        ratio: λ, the share of masked tokens.
        generator: "conv", "self_attention" or "cross_attention" (table 7).
        features: what of a shallow block is read: "ffn", what it leaves, or "mha", what its attention's sum
            leaves (table 9).
    """

    shallow: tuple[int, ...]
    shallow_dims: tuple[int, ...]
    deep_dim: int
    grid: tuple[int, int]
    ratio: float = 0.5
    generator: str = "conv"
    features: str = "ffn"

    def __post_init__(self) -> None:
        if self.generator not in GENERATORS:
            raise UnknownNameError("generator", str(self.generator), GENERATORS)
        if self.features not in FEATURES:
            raise UnknownNameError("features", str(self.features), FEATURES)
        if len(self.shallow) != len(self.shallow_dims) or not self.shallow:
            raise RecipeError(
                f"ViTKD needs a width of the teacher for each shallow block, got {self.shallow_dims} for "
                f"{self.shallow}"
            )


def inject_vitkd(module: TracedModule, config: VitKdConfig, known: Anatomy | None = None) -> TracedModule:
    """Add the outputs `vitkd/shallow_0`, ... (B, N, D_teacher), `vitkd/generated` (B, N, D_teacher) and
    `vitkd/mask` (B, N); `strip` takes them out.

    Raises:
        MatchError: the model has no such block.
    """
    known = known or anatomy(module)
    module = fork(module, to_edit=True)
    injection = Injection(module, NAME, asdict(config))
    nodes = {node.name: node for node in module.graph.nodes}
    reference = reference_tensor(module)
    for place, (index, dim) in enumerate(zip(config.shallow, config.shallow_dims, strict=True)):
        block = known.blocks[known.position(index)]
        mimic = ViTKDMimic(block.channels, dim or block.channels, block.layout, block.prefix_tokens)
        _emit(injection, f"shallow_{place}", mimic.to(reference), nodes[feature_of(block, config.features)])
    last = known.blocks[-1]
    generator = ViTKDGenerator(
        config.generator,
        last.channels,
        config.deep_dim,
        config.grid,
        config.ratio,
        layout=last.layout,
        prefix_tokens=last.prefix_tokens,
    ).to(reference)
    final = nodes[known.final]
    both = injection.call("generator", generator, final, after=final)
    mask = injection.item(both, 1)
    injection.emit("generated", injection.item(both, 0))
    injection.emit("mask", mask)
    return injection.finish()


def feature_of(block: Block, features: str) -> str:
    """The name of the node that holds a block's feature.

    Raises:
        MatchError: "mha" of a block whose first branch does not mix tokens.
    """
    if features == "ffn":
        return block.output
    if not block.branches or block.branches[0].mixing.mixes is False or len(block.branches) < 2:
        raise MatchError(
            f"features='mha' reads what a block's attention adds to, and {block.path} has no branch that "
            "mixes tokens before another; use features='ffn'"
        )
    return block.branches[0].add


def _emit(injection: Injection, name: str, head: ViTKDMimic, node: Node) -> None:
    injection.emit(name, injection.call(name, head, node, after=node))
