"""A conv token and an involution token beside the class token (CiT).

    x = [cls, conv, inv, patches] + positions,   conv = mean of the conv stem's tokens,
                                                 inv = mean of the involution stem's,
                                                 patches = the sum of both            (CiT 3.2, "aligned")
                                                 conv, inv = parameters               (CiT-Ti, S: "random")

The class token attends to two more tokens, so this is another student: stems and tokens stay its own, under
`bias_tokens`, and `strip` leaves them. Their heads, one a teacher, are training's: `bias_heads.py`.
"""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from vmkd_fx.errors import ReceiptError, RecipeError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.joins import DataFlow
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.replace import Replaced, record_replacement
from vmkd_fx.graph.shapes import node_shapes
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.passes.bias_stems import ConvStem, InvolutionStem, patch_edge
from vmkd_fx.passes.longer_stream import (
    Stream,
    find_stream,
    fit_to_more_tokens,
    insert_opened,
    join_tokens,
    replace_patches,
)

NAME = "bias_tokens"
"""Of the replacement, and of the submodule under which stems and tokens stand."""

TOKENS = ("conv", "inv")


@dataclass(frozen=True)
class BiasTokenConfig:
    """Settings of the tokens.

    Attributes:
        tokens: "aligned", made from the images by the stems, which make the patches too (CiT-SAK); "random",
            learnt parameters beside the student's own patches (CiT-Ti, CiT-S).
    """

    tokens: str = "aligned"

    def __post_init__(self) -> None:
        if self.tokens not in ("aligned", "random"):
            raise RecipeError(f"CiT's tokens are 'aligned' or 'random', got tokens={self.tokens!r}")


class BiasTokens(nn.Module):
    """What the tokens need besides the stems: (1, 1, C) each where they are random, positions (1, 2, C)."""

    def __init__(self, channels: int, random: bool, positions: bool) -> None:
        super().__init__()
        names = [f"{token}_token" for token in TOKENS] if random else []
        for name in [*names, *(["pos_embed"] if positions else [])]:
            parameter = nn.Parameter(torch.empty(1, 2 if name == "pos_embed" else 1, channels))
            nn.init.trunc_normal_(parameter, std=0.02)
            self.register_parameter(name, parameter)


def add_bias_tokens(
    module: TracedModule, config: BiasTokenConfig, known: Anatomy | None = None
) -> TracedModule:
    """Put a conv token and an involution token between the prefix tokens and the patches, for good.

    New keys: `bias_tokens.pos_embed` where the class token has a position; random tokens
    `bias_tokens.conv_token` and `bias_tokens.inv_token`; aligned ones `bias_tokens.conv_stem.*` and
    `bias_tokens.inv_stem.*`, and then those of the patch embedding are gone. `known` is the module's anatomy,
    where it is at hand.

    Returns:
        A graph over the same blocks with two more tokens. It is another function, and `strip` leaves it so.

    Raises:
        MatchError: no class token stands before the patches in all blocks, or a later part holds for the old
            number of tokens alone; says which.
        ReceiptError: something was added to the graph before, or these tokens were.
    """
    _refuse_earlier(module)
    known = known or anatomy(module)
    module = fork(module, to_edit=True)
    shapes = node_shapes(module)
    before = {node.name: shape for node, shape in shapes.items()}
    stream = find_stream(module, known, DataFlow(module, shapes))
    random = config.tokens == "random"
    reference = reference_tensor(module)
    with reference.device:
        held = BiasTokens(stream.channels, random, stream.has_positions).to(reference.dtype)
    module.add_submodule(NAME, held.train(module.training))
    tokens, patches = (_random_tokens if random else _aligned_tokens)(module, stream)
    joined = join_tokens(module, stream, tokens, f"{NAME}.pos_embed")
    if patches is not stream.patches:
        replace_patches(module, stream.patches, patches)
    fit_to_more_tokens(module, before, joined, stream, len(TOKENS))
    module.meta["info"] = replace(module.info, num_prefix_tokens=stream.prefix + len(TOKENS))
    paths = (NAME,) if random else (f"{NAME}.conv_stem", f"{NAME}.inv_stem")
    record_replacement(module, Replaced(NAME, asdict(config), paths))
    return module


def _refuse_earlier(module: TracedModule) -> None:
    if module.receipts:
        added = ", ".join(receipt.name for receipt in module.receipts)
        raise ReceiptError(
            f"{NAME} makes another student of {module.info.name}, and {added} was added to it before; "
            "add CiT's tokens first"
        )
    if any(name.split(".")[0] == NAME for name, _ in module.named_modules()) or hasattr(module, NAME):
        raise ReceiptError(f"{module.info.name} already has a part called {NAME!r}; add CiT's tokens once")


def _aligned_tokens(module: TracedModule, stream: Stream) -> tuple[list[Node], Node]:
    """Both stems: the means (B, 1, C) of their tokens, and the sum of both (B, P, C)."""
    graph, patches = module.graph, stream.patches
    size = module.info.need_input_size()
    edge = patch_edge(size, stream.count, module.info.name)
    images = next(node for node in graph.nodes if node.op == "placeholder")
    reference = reference_tensor(module)
    made = []
    for token, kind in zip(TOKENS, (ConvStem, InvolutionStem), strict=True):
        with reference.device:
            stem = kind(size[0], stream.channels, edge).to(reference.dtype)
        made.append(insert_opened(module, f"{NAME}.{token}_stem", stem, images, patches))
    with graph.inserting_before(patches):
        both = graph.call_function(operator.add, (made[0], made[1]))
        means = [
            _named(module, token, "mean", (stem, 1, True)) for token, stem in zip(TOKENS, made, strict=True)
        ]
    return means, both


def _random_tokens(module: TracedModule, stream: Stream) -> tuple[list[Node], Node]:
    """Both parameters, for each image (B, 1, C), and the patches as they are."""
    graph = module.graph
    with graph.inserting_after(stream.joined):
        shape = graph.call_function(getattr, (stream.patches, "shape"))
    with graph.inserting_after(shape):
        count = graph.call_function(operator.getitem, (shape, 0))
    found: list[Node] = []
    for token in TOKENS:
        with graph.inserting_after(found[-1] if found else count):
            parameter = graph.get_attr(f"{NAME}.{token}_token")
        with graph.inserting_after(parameter):
            found.append(_named(module, token, "expand", (parameter, count, -1, -1)))
    return found, stream.patches


def _named(module: TracedModule, token: str, method: str, args: tuple[Any, ...]) -> Node:
    """A method's call whose node is called after the token that it returns."""
    return module.graph.create_node("call_method", method, args, name=f"{NAME}_{token}")
