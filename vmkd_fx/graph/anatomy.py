"""`anatomy`: the one translator between graphs, which speak of nodes, and methods, which speak of blocks and
mixers.

Blocks, residual branches, layouts and token mixers are read from what the graph computes, never from class
names.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from vmkd_fx.errors import MatchError
from vmkd_fx.graph.edit import logits_node, owner
from vmkd_fx.graph.mixing import Axes, Mixing, mixes_tokens
from vmkd_fx.graph.residual import Residual, find_residuals
from vmkd_fx.graph.shapes import Shape, node_shapes
from vmkd_fx.graph.trace import trace
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.table import table

LOCATION_AXES: dict[str, Axes] = {"NLC": frozenset({1}), "NCHW": frozenset({2, 3}), "NHWC": frozenset({1, 2})}
_NORM_FUNCTIONS = {
    F.layer_norm,
    F.group_norm,
    F.batch_norm,
    F.instance_norm,
    getattr(F, "rms_norm", F.layer_norm),
}
_NORM_MODULES = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block.

    Attributes:
        stream, end, add: names of the node it reads, its last node, and the sum.
        norm: name of the norm that it starts with, None without one.
        body: names of the nodes behind the norm.
        mixing: whether the body mixes tokens, and by what.
    """

    stream: str
    end: str
    add: str
    norm: str | None
    body: tuple[str, ...]
    mixing: Mixing


@dataclass(frozen=True)
class Block:
    """One block: consecutive residual branches of one module.

    Attributes:
        path: module path.
        input, output: names of the nodes that enter and leave it.
        layout: "NLC", "NCHW" or "NHWC".
        channels, tokens: of the output, tokens without the prefix tokens.
        prefix_tokens: class, distillation and register tokens in front.
        branches: in graph order.
    """

    path: str
    input: str
    output: str
    layout: str
    channels: int
    tokens: int
    prefix_tokens: int
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Anatomy:
    """What a model consists of.

    Attributes:
        model: its name.
        blocks: in order.
        logits: name of the node that holds them.
        num_classes: their length.
        features: channels that the classifier reads; None where it is not found.
    """

    model: str
    blocks: tuple[Block, ...]
    logits: str
    num_classes: int
    features: int | None

    def __str__(self) -> str:
        """Blocks as rows; neighbours that differ in their path alone share one."""
        rows = []
        for facts, group in groupby(enumerate(self.blocks), key=lambda item: _facts(item[1])):
            (first, block), *rest = group
            last = rest[-1] if rest else None
            index = f"{first}-{last[0]}" if last else str(first)
            rows.append((index, f"{block.path} to {last[1].path}" if last else block.path, *facts))
        header = ("block", "module", "layout", "channels", "tokens", "prefix", "branches")
        title = (
            f"{self.model}: {len(self.blocks)} blocks, {self.num_classes} classes from node {self.logits!r}"
        )
        return f"{title}\n{table(header, rows, right=header[3:6])}" if rows else title

    def position(self, where: int | str) -> int:
        """The index of a block given as an index (-1 is the last) or as a fraction of the depth ("2/3").

        A fraction names the block after which that share of the depth is done: "2/3" of 12 blocks is block 7,
            the eighth.

        Raises:
            MatchError: the model has no blocks, or no such block, or the place counts from an end that the
                anatomy does not reach: its last block does not leave what the classifier reads.
        """
        count = len(self.blocks)
        if not count:
            raise MatchError(
                f"{self.model} has no residual blocks with token features, so there is no block {where!r}"
            )
        try:
            if isinstance(where, str) and "/" in where:
                upper, lower = (int(part) for part in where.split("/"))
                index = max(upper * count // lower - 1, 0) if 0 < upper <= lower else count
            else:
                index = int(where)
        except (ValueError, ZeroDivisionError):
            index = count
        if not -count <= index < count:
            raise MatchError(
                f"{self.model} has no block {where!r}: it has {count}, so 0 to {count - 1}, -{count} to -1, "
                "or a fraction of the depth such as '2/3'"
            )
        if self.features not in (None, self.blocks[-1].channels) and not str(where).isdigit():
            last = self.blocks[-1]
            raise MatchError(
                f"{self.model}: place {where!r} counts from the end, and the last block found, {last.path}, "
                f"leaves {last.channels} channels while the classifier reads {self.features}; "
                f"name a block by its index, 0 to {count - 1}"
            )
        return index % count


def _facts(block: Block) -> tuple[str, ...]:
    verdicts = {True: "mixes tokens ({})", False: "channels only", None: "unclear: {}"}
    branches = ", ".join(
        verdicts[branch.mixing.mixes].format(branch.mixing.by) + ("" if branch.norm else ", no norm")
        for branch in block.branches
    )
    return block.layout, str(block.channels), str(block.tokens), str(block.prefix_tokens), branches


def anatomy(model: Any) -> Anatomy:
    """Read blocks, branches, layouts and token mixers from a model, a traced module or a training task."""
    module = trace(model)
    shapes = node_shapes(module)
    logits = logits_node(module)
    residuals = find_residuals(module, shapes)
    groups = [list(group) for _, group in groupby(residuals, key=_block_path)]
    blocks = tuple(_read_block(module, shapes, group) for group in groups)
    features = _classifier_inputs(logits, module)
    return Anatomy(module.info.name, blocks, logits.name, shapes[logits][-1], features)


def _block_path(residual: Residual) -> str:
    """The deepest module with a number as its name around the sum, else the module that holds the sum."""
    path = owner(residual.add) or _common_path(residual)
    parts = path.split(".")
    while len(parts) > 1 and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts) if parts[-1].isdigit() else path


def _common_path(residual: Residual) -> str:
    """Where the branch's modules and parameters live, for a graph that does not know its modules' calls."""
    targets = [str(n.target).split(".") for n in residual.nodes if n.op in ("call_module", "get_attr")]
    same = takewhile(lambda names: len(set(names)) == 1, zip(*targets, strict=False))
    return ".".join(names[0] for names in same)


def _classifier_inputs(logits: Node, module: TracedModule) -> int | None:
    """Channels that the classifier reads: of the Linear or convolution that the logits come from first."""
    todo, seen = [logits], {logits}
    while todo:
        node = todo.pop(0)
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.Linear):
            return layer.in_features
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        todo += fresh
    return None


def _read_block(module: TracedModule, shapes: dict[Node, Shape], residuals: list[Residual]) -> Block:
    path = _block_path(residuals[-1])
    output = _output(residuals[-1].add, path, shapes)
    shape = shapes[output]
    layout = _layout(module, shapes, residuals, len(shape))
    channel_axis = {"NLC": 2, "NCHW": 1, "NHWC": 3}[layout]
    tokens = shape[1] * shape[2] * shape[3] // shape[channel_axis] if len(shape) == 4 else shape[1]
    prefix = module.info.num_prefix_tokens if layout == "NLC" else 0
    branches = tuple(_read_branch(module, shapes, residuals, residual) for residual in residuals)
    stream = residuals[0].stream.name
    return Block(path, stream, output.name, layout, shape[channel_axis], tokens - prefix, prefix, branches)


def _output(add: Node, path: str, shapes: dict[Node, Shape]) -> Node:
    """The last node of the block: the sum, or what the block still does to it alone (an activation, say)."""
    node = add
    while len(node.users) == 1:
        follower = next(iter(node.users))
        inside = owner(follower) == path or owner(follower).startswith(path + ".")
        if not inside or shapes.get(follower) != shapes[add]:
            break
        node = follower
    return node


def _layout(module: TracedModule, shapes: dict[Node, Shape], residuals: list[Residual], rank: int) -> str:
    """Three axes are NLC; of four, the channels are last where a norm or a Linear of the last axis reads the
    stream.
    """
    if rank == 3:
        return "NLC"
    for residual in residuals:
        for node in residual.nodes:
            if residual.stream in node.all_input_nodes and len(shapes[residual.stream]) == rank:
                target = module.get_submodule(str(node.target)) if node.op == "call_module" else None
                if _channels_last(target) == shapes[residual.stream][-1] or node.target is F.layer_norm:
                    return "NHWC"
    return "NCHW"


def _channels_last(layer: nn.Module | None) -> int | None:
    """The length of the last axis that a Linear or a LayerNorm asks for."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return layer.normalized_shape[-1] if isinstance(layer, nn.LayerNorm) else None


def _read_branch(
    module: TracedModule, shapes: dict[Node, Shape], block: list[Residual], residual: Residual
) -> Branch:
    axes = LOCATION_AXES[_layout(module, shapes, block, len(shapes[residual.stream]))]
    norm = _leading_norm(module, residual)
    entry = norm or residual.stream
    body = residual.nodes[residual.nodes.index(norm) + 1 :] if norm else residual.nodes
    mixing = mixes_tokens(module, shapes, body, entry, axes)
    return Branch(
        residual.stream.name,
        residual.end.name,
        residual.add.name,
        norm.name if norm else None,
        tuple(node.name for node in body),
        mixing,
    )


def _leading_norm(module: TracedModule, residual: Residual) -> Node | None:
    """The norm, or the per-channel affine in its place, that alone reads the stream at the head of the
    branch.
    """
    readers = [node for node in residual.nodes if residual.stream in node.all_input_nodes]
    if len(readers) != 1:
        return None
    node = readers[0]
    if node.op == "call_module":
        return node if isinstance(module.get_submodule(str(node.target)), _NORM_MODULES) else None
    if node.target in _NORM_FUNCTIONS:
        return node
    parameters = [source for source in node.all_input_nodes if source.op == "get_attr"]
    return node if getattr(node.target, "__name__", "") == "addcmul" and len(parameters) == 2 else None
