"""Per-channel affines in the place of token mixers (RIFormer, Wang et al. 2023).

    x + Affine(LN(x))   with   Affine(n) = s n + t - n                                    (RIFormer Eq. 1)
    LN(x; g, b), then Affine   =   LN(x; g (s - 1), b (s - 1) + t)                             (Eq. 2 to 4)

The student trains without any token mixer, and its affines merge into the norms before them when it is
lowered, so that an identity is left of each mixer. The subtraction is PoolFormer's: with s = 1 and t = 0, the
start, the branch adds nothing. Eq. 2 as printed ends in -T; it is +T, as Eq. 3 and 4 have it.

A branch keeps its norm before the mixer, and its layer scale and its drop path behind. Only blocks that mix
tokens in one branch and channels in another fit (MetaFormer): of a block that does both in one nothing would
be left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.fx import Node

from vmkd_fx.errors import RecipeError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.layout import CHANNEL_AXIS
from vmkd_fx.graph.parts import Anatomy, Block, Branch
from vmkd_fx.graph.replace import Replacement, refers_to, replacements, within
from vmkd_fx.graph.shapes import Shape, node_shapes
from vmkd_fx.graph.trace import as_module
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.trailing import split_trailing
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.models.affine_mixer import AffineMixer
from vmkd_fx.passes.mixers import (
    Blocks,
    Mixer,
    NoMixer,
    Stuck,
    body_of,
    find_mixers,
    module_around,
    refuse_entangled,
    what_mixes,
)

NAME = "affine"


@dataclass(frozen=True)
class AffineConfig:
    """Settings of the replacement.

    Attributes:
        blocks: whose mixers are replaced: an index or a share of the depth each; None for all that mix
            tokens.
    """

    blocks: Blocks = None

    def __post_init__(self) -> None:
        if self.blocks is not None and not self.blocks:
            raise RecipeError("blocks=() names no block to replace mixers in; blocks=None takes all")


def inject_affine_mixers(
    module: TracedModule, config: AffineConfig, known: Anatomy | None = None
) -> TracedModule:
    """Replace token mixers by `AffineMixer`. `known` is the module's anatomy, where it is at hand.

    The new module stands under the path of the mixer: `stages.0.blocks.0.token_mixer.scale` and `.shift` say.

    Returns:
        A graph over the other parts of the same student. It is another function, and `strip` leaves it so.

    Raises:
        MatchError: the model has no mixer that can be replaced, or one that cannot; says what each block has.
        ReceiptError: something was added to the graph before.
    """
    module = fork(module, to_edit=True)
    replacement = Replacement(module, NAME, asdict(config))
    known = known or anatomy(module)
    shapes = node_shapes(module)
    mixers = find_mixers(
        known,
        config.blocks,
        lambda block: _mixers_of(module, block, shapes),
        "affine mixers replace what mixes tokens in a branch of its own, between a norm and a residual sum",
    )
    reference = reference_tensor(module)
    for mixer in mixers:
        channels = shapes[mixer.entry][CHANNEL_AXIS[mixer.layout]]
        affine = AffineMixer(channels, mixer.layout != "NCHW", reference.device, reference.dtype)
        replacement.put(mixer.path, affine, mixer.entry, mixer.nodes[-1])
    return replacement.finish()


def copy_teacher_weights(
    student: TracedModule, teacher: nn.Module
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Start a student from its teacher's weights, except the mixers (RIFormer's guideline 5).

    Parameters and buffers are copied where name and shape fit, into the student's own tensors.

    Args:
        student: with its mixers replaced.
        teacher: a model, a traced module or a task; it is left as it is.

    Returns:
        The names that were copied, and of the student's others each name with the reason.
    """
    given = as_module(teacher).state_dict()
    mixers = [path for replaced in replacements(student) for path in replaced.paths]
    copied: list[str] = []
    rest: list[tuple[str, str]] = []
    with torch.no_grad():
        for name, value in student.state_dict().items():
            if any(within(name, path) for path in mixers):
                rest.append((name, "belongs to a mixer that was replaced"))
            elif name not in given:
                rest.append((name, "the teacher has none of this name"))
            elif given[name].shape != value.shape:
                shapes = f"{tuple(given[name].shape)}, the student's {tuple(value.shape)}"
                rest.append((name, f"the teacher's is {shapes}"))
            else:
                value.copy_(given[name])
                copied.append(name)
    return tuple(copied), tuple(rest)


def _mixers_of(module: TracedModule, block: Block, shapes: Mapping[Node, Shape]) -> list[Mixer]:
    mixing = [branch for branch in block.branches if branch.mixing.mixes is not False]
    if not mixing:
        raise NoMixer(what_mixes(block))
    if len(mixing) == len(block.branches):
        raise Stuck(f"{what_mixes(block)}, and no branch is left for the channels alone")
    nodes = {node.name: node for node in module.graph.nodes}
    return [_mixer_of(module, block, branch, nodes, shapes) for branch in mixing]


def _mixer_of(
    module: TracedModule,
    block: Block,
    branch: Branch,
    nodes: Mapping[str, Node],
    shapes: Mapping[Node, Shape],
) -> Mixer:
    what = f"what {'mixes' if branch.mixing.mixes else 'may mix'} tokens ({branch.mixing.by})"
    if branch.norm is None:
        raise Stuck(f"{what} starts without a norm, into which its affine could merge")
    if branch.shortcut != "identity":
        raise Stuck(f"{what} is added to another shortcut than the stream itself")
    entry = nodes[branch.norm]
    body, trailing = split_trailing(module, body_of(branch, nodes))
    path = module_around(module, body, block.path, trailing) if body else None
    if path is None:
        raise Stuck(f"{what} is no module of its own in the block")
    while trailing and _belongs(trailing[0], path):
        body, trailing = (*body, trailing[0]), trailing[1:]
    refuse_entangled(module, entry, body)
    if shapes.get(body[-1]) != shapes[entry]:
        raise Stuck(f"{what} turns {shapes[entry]} into {shapes.get(body[-1])}")
    return Mixer(path, branch.layout, entry, body)


def _belongs(node: Node, path: str) -> bool:
    """Whether a node calls a part of the module at `path`, or reads a parameter of it."""
    return refers_to(node, path) or any(refers_to(source, path) for source in node.all_input_nodes)
