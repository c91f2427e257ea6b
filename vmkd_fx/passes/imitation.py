"""What module imitation reads in the student, in the teacher's width, and out again (RIFormer section 4.4).

For each layer: what its block leaves (Eq. 6 and 7) and what its affine, or whatever its first branch computes
before layer scale and drop path, leaves (Eq. 8). Where the widths differ, a projection that training alone
needs stands between; relations need none.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vmkd_fx.errors import MatchError, RecipeError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.edit import Injection
from vmkd_fx.graph.parts import Anatomy, Block
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.passes.heads.vitkd import ViTKDMimic

NAME = "imitation"


@dataclass(frozen=True)
class ImitationConfig:
    """Indices of the student's blocks, and the teacher's width at each."""

    layers: tuple[int, ...]
    dims: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.dims):
            raise RecipeError(
                "module imitation needs a width of the teacher for each layer, "
                f"got {self.dims} for {self.layers}"
            )


def inject_imitation(
    module: TracedModule, config: ImitationConfig, known: Anatomy | None = None
) -> TracedModule:
    """Add the outputs `imitation/input_0`, `imitation/output_0` (B, N, D_teacher), `imitation/relation_0` (B,
    N, C) and so on for each layer; `strip` takes them out.

    Raises:
        MatchError: the model has no such block, or a block without a branch.
    """
    known = known or anatomy(module)
    module = fork(module, to_edit=True)
    injection = Injection(module, NAME, asdict(config))
    nodes = {node.name: node for node in module.graph.nodes}
    reference = reference_tensor(module)
    for place, (index, dim) in enumerate(zip(config.layers, config.dims, strict=True)):
        block = known.blocks[known.position(index)]
        left, mixed = nodes[block.output], nodes[work_of(block)]
        for name, node, width in (
            ("input", left, dim),
            ("output", mixed, dim),
            ("relation", left, block.channels),
        ):
            prefix = block.prefix_tokens
            head = ViTKDMimic(block.channels, width, block.layout, prefix).to(reference)
            injection.emit(f"{name}_{place}", injection.call(f"{name}_{place}", head, node, after=node))
    return injection.finish()


def work_of(block: Block) -> str:
    """The name of the node that ends the work of a block's first branch, its token mixer or affine.

    Raises:
        MatchError: the block has no branch, or one in another layout or of another width than what it leaves.
    """
    if not block.branches or block.branches[0].layout != block.layout:
        raise MatchError(f"{block.path} has no branch of its layout whose mixer could be imitated")
    if block.branches[0].channels != block.channels:
        raise MatchError(
            f"module imitation compares a mixer with its block, and the first branch of {block.path} has "
            f"{block.branches[0].channels} channels of the block's {block.channels}"
        )
    return block.branches[0].work
