"""Spatial and channel distillation tokens beside chosen blocks, and out again (STD).

Into a block's output Z (P patches, N channels) a pair of tokens looks, a spatial T_S (1, N) and a channel T_C
(P, 1):

    T_S(k) = W2 σ(W1 LN([Z || T_S(k-1)])) + T_S(k-1)   along the patches, each channel alone  (Eq. 3, 5)
    T_C(k) = W4 σ(W3 LN([Z || T_C(k-1)])) + T_C(k-1)   along the channels, each patch alone   (Eq. 4, 6)

for k = 1..K; [T_S(K) || T_C(K)] feeds one distillation head a teacher. Nothing flows back into Z, so taking
the branch out leaves the student's own function bit for bit as it is: that is the inverse, `strip`.

The readings that reproduce STD table 2: one pair, its own MLPs and head for each teacher, d_S = N/2, d_C =
4N, biases everywhere, Z as the block leaves it (before the final norm). The statistics network of the mutual
information, 0.84 M for two teachers of a CycleMLP, is not counted there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import nn
from torch.fx import Node

from vmkd_fx.errors import MatchError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.edit import Injection
from vmkd_fx.graph.parts import Anatomy, Block
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.passes.heads.information import TokenInformation
from vmkd_fx.passes.std_modules import SpatialChannelTokens, StdConfig
from vmkd_fx.passes.std_shared import SharedTokens, shared_blocks

NAME = "std"

INFORMATION = f"{NAME}/information"
"""The output that holds the mutual information's loss."""


def inject_std_tokens(module: TracedModule, config: StdConfig, known: Anatomy | None = None) -> TracedModule:
    """Add tokens and one distillation head for each teacher. `known` is the module's anatomy, where it is at
    hand.

    Returns:
        A graph over the same student with outputs `logits` and `std/0`, `std/1`, ... each (B, classes), and
        with `config.information` the scalar `std/information`, a loss: see `TokenInformation`.

    Raises:
        MatchError: the model has no such block, or its blocks hold no tokens.
    """
    known = known or anatomy(module)
    blocks = blocks_with_tokens(known, config)
    module = fork(module, to_edit=True)
    injection = Injection(module, NAME, asdict(config))
    reference = reference_tensor(module)
    add_tokens = _shared_tokens if config.variant == "third_party" else _own_tokens
    seen: list[tuple[Block, Node]] = []
    with reference.device:
        for teacher, (block, tokens) in enumerate(add_tokens(injection, blocks, config, reference)):
            head = _head(sum(config.lengths(block)), known.num_classes).to(reference.dtype)
            injection.emit(
                str(teacher), injection.call(f"teacher_{teacher}.head", head, tokens, after=tokens)
            )
            seen.append((block, tokens))
        if config.information:
            sizes = [config.lengths(block) for block, _ in seen]
            information = TokenInformation(sizes, variant=config.variant).to(reference.dtype)
            _measure(injection, information, [tokens for _, tokens in seen])
    return injection.finish()


def blocks_with_tokens(known: Anatomy, config: StdConfig) -> list[Block]:
    """The block for each position.

    Raises:
        MatchError: there is no such block, or it holds no tokens, or tokens cannot flow between them as the
            variant would have it.
    """
    blocks = [known.blocks[known.position(position)] for position in config.positions]
    for block, position in zip(blocks, config.positions, strict=True):
        if block.tokens < 2:
            raise MatchError(
                f"STD asks for token features after block {position!r}, but {block.path} of {known.model} "
                f"leaves {block.tokens} patch tokens of {block.channels} channels; choose an earlier one"
            )
    return shared_blocks(known, config) if config.variant == "third_party" else blocks


def _own_tokens(
    injection: Injection, blocks: list[Block], config: StdConfig, reference: torch.Tensor
) -> Iterator[tuple[Block, Node]]:
    """For each teacher a pair of tokens beside its block: the block, and the node that holds them."""
    nodes = {node.name: node for node in injection.module.graph.nodes}
    for teacher, block in enumerate(blocks):
        tokens = SpatialChannelTokens(block, config).to(reference.dtype)
        leaves = nodes[block.output]
        yield block, injection.call(f"teacher_{teacher}.tokens", tokens, leaves, after=leaves)


def _shared_tokens(
    injection: Injection, blocks: list[Block], config: StdConfig, reference: torch.Tensor
) -> Iterator[tuple[Block, Node]]:
    """For each teacher the last of the blocks, and its share of what the tokens of all have become there."""
    nodes = {node.name: node for node in injection.module.graph.nodes}
    found: list[Node] = []
    for place, block in enumerate(blocks):
        tokens = SharedTokens(block, config, first=not found).to(reference.dtype)
        leaves = nodes[block.output]
        found.append(injection.call(f"tokens_{place}", tokens, leaves, *found[-1:], after=leaves))
    for teacher in range(config.heads):
        yield blocks[-1], injection.item(found[-1], teacher)


def _head(length: int, classes: int) -> nn.Linear:
    head = nn.Linear(length, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def _measure(injection: Injection, information: TokenInformation, tokens: list[Node]) -> None:
    """Call `information` last of all, so that what it draws leaves the student's own random numbers alone."""
    order = {node: index for index, node in enumerate(injection.module.graph.nodes)}
    last = max(injection.outputs.values(), key=order.__getitem__)
    injection.emit("information", injection.call("information", information, *tokens, after=last))
