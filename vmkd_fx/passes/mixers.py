"""What the passes that replace token mixers share: which blocks, where a mixer stands, what was found."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg

from vmkd_fx.errors import MatchError
from vmkd_fx.graph.edit import changes_in_place, overwritten
from vmkd_fx.graph.parts import Anatomy, Block, Branch
from vmkd_fx.graph.replace import refers_to, within
from vmkd_fx.graph.shapes import Shape
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import attribute

_MOVES = {"transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "mT"}

Blocks = tuple[int | str, ...] | None
"""Blocks by index or by their share of the depth ("2/3"); None for all."""


@dataclass(frozen=True)
class Mixer:
    """The part of a branch that mixes tokens.

    Attributes:
        path: of the module that it is.
        layout: of the tensors that enter and leave it: "NLC", "NCHW" or "NHWC".
        entry: the node that it reads.
        nodes: its own nodes, in graph order; the last is what it returns.
    """

    path: str
    layout: str
    entry: Node
    nodes: tuple[Node, ...]


class NoMixer(Exception):  # noqa: N818 (an answer)
    """What a block has in place of the kind of mixer that was asked for."""


class Stuck(NoMixer):
    """Why a mixer of the kind that was asked for cannot be replaced."""


def chosen_blocks(known: Anatomy, blocks: Blocks) -> dict[int, Block]:
    """The blocks by index.

    Raises:
        MatchError: there is no such block.
    """
    chosen = range(len(known.blocks)) if blocks is None else {known.position(where) for where in blocks}
    return {index: known.blocks[index] for index in sorted(chosen)}


def find_mixers(
    known: Anatomy, blocks: Blocks, find: Callable[[Block], list[Mixer]], asked: str
) -> list[Mixer]:
    """What `find` finds in the blocks, in order.

    A block without such a mixer is passed over, unless it was asked for by name. A mixer that cannot be
    replaced is refused in any case.

    Raises:
        MatchError: says what each block has instead.
    """
    found: list[Mixer] = []
    without: dict[int, str] = {}
    stuck: dict[int, str] = {}
    for index, block in chosen_blocks(known, blocks).items():
        try:
            found += find(block)
        except Stuck as answer:
            stuck[index] = str(answer)
        except NoMixer as answer:
            without[index] = str(answer)
    if blocks:
        stuck |= without
    if stuck or not found:
        raise MatchError(f"{asked}, and {_findings(known, stuck or without)}")
    return found


def _findings(known: Anatomy, reasons: Mapping[int, str]) -> str:
    """What was found in each block; neighbours with the same finding share one."""
    if not known.blocks:
        return f"{known.model} has no blocks with token features"
    runs: list[tuple[list[int], str]] = []
    for index, reason in sorted(reasons.items()):
        if runs and runs[-1][1] == reason and runs[-1][0][-1] == index - 1:
            runs[-1][0].append(index)
        else:
            runs.append(([index], reason))
    lines = []
    for (first, *rest), reason in runs:
        lines.append(f"block {first}: {reason}" if not rest else f"blocks {first} to {rest[-1]}: {reason}")
    return f"in {known.model}, {'; '.join(lines)}"


def what_mixes(block: Block) -> str:
    """What each branch of a block does with the tokens, in words."""
    verdicts = {True: "mixes tokens by {}", False: "works on channels only", None: "is unclear: {}"}
    return ", ".join(
        f"branch {index} {verdicts[branch.mixing.mixes].format(branch.mixing.by)}"
        for index, branch in enumerate(block.branches)
    )


def body_of(branch: Branch, nodes: Mapping[str, Node]) -> tuple[Node, ...]:
    """The branch's nodes behind its norm."""
    return tuple(nodes[name] for name in branch.body)


def module_around(
    module: TracedModule, nodes: Sequence[Node], block: str, behind: Sequence[Node] = ()
) -> str | None:
    """The path of the largest module inside `block` that holds all modules and parameters which `nodes` read
    and nothing that any other node reads; None where there is no such module. A dropout of the smallest such
    module may be among `behind`.
    """
    own = _with_constants(module, nodes)
    targets = [str(node.target) for node in own if node.op == "call_module"]
    targets += [holder for node in own if (holder := _holder_of_parameter(module, node)) is not None]
    if not targets or not all(within(target, block) for target in targets):
        return None
    path, found = _common(targets), None
    own |= {node for node in behind if refers_to(node, path)} if path != block else set()
    others = [node for node in module.graph.nodes if node not in own]
    while len(path) > len(block) and not any(refers_to(node, path) for node in others):
        found, path = path, path.rpartition(".")[0]
    return found


def _holder_of_parameter(module: TracedModule, node: Node) -> str | None:
    """The path of the module whose parameter a node reads itself; buffers, as masks are, count for
    nothing.
    """
    if node.op != "get_attr" or not isinstance(attribute(module, str(node.target)), nn.Parameter):
        return None
    return str(node.target).rpartition(".")[0]


def _with_constants(module: TracedModule, nodes: Sequence[Node]) -> set[Node]:
    """The nodes and those that compute from parameters and numbers what these alone read."""
    from_images: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(source in from_images for source in node.all_input_nodes):
            from_images.add(node)
    own = set(nodes)
    for node in reversed(module.graph.nodes):
        if node not in from_images and node.users and set(node.users) <= own:
            own.add(node)
    return own


def token_mlps(
    module: TracedModule, body: tuple[Node, ...], shapes: Mapping[Node, Shape]
) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """What stands between an exchange of tokens and channels and the one back, with Linear layers in it: what
    enters, and the nodes with both exchanges.
    """
    last: Node | None = None
    for place, first in enumerate(body):
        if (last is not None and first in body[: body.index(last)]) or not _exchanges(first, shapes):
            continue
        for end in body[place + 1 :]:
            piece = _closed_piece(first, end, body, shapes) if _exchanges(end, shapes) else None
            if piece and any(linear_of(module, node) for node in piece):
                yield first.all_input_nodes[0], piece
                last = end
                break


def _closed_piece(
    first: Node, end: Node, body: tuple[Node, ...], shapes: Mapping[Node, Shape]
) -> tuple[Node, ...] | None:
    """The nodes from `first` to `end`, where `end` depends on no other tensor that comes from the images."""
    piece, todo = {first, end}, [end]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source in piece or not _holds_tensors(source, shapes):
                continue
            if source not in body or body.index(source) < body.index(first):
                return None
            piece.add(source)
            todo.append(source)
    return tuple(node for node in body if node in piece)


def _holds_tensors(node: Node, shapes: Mapping[Node, Shape]) -> bool:
    """Whether a node that is computed holds a tensor or several, and not numbers or a parameter."""
    parts = (user for user in node.users if user.target is operator.getitem)
    return node.op != "get_attr" and (node in shapes or any(part in shapes for part in parts))


def _exchanges(node: Node, shapes: Mapping[Node, Shape]) -> bool:
    """Whether a node turns (B, N, C) into (B, C, N)."""
    name = node.args[1] if node.target is getattr else getattr(node.target, "__name__", node.target)
    if name not in _MOVES or len(shapes.get(node, ())) != 3 or len(node.all_input_nodes) != 1:
        return False
    probe = torch.empty(2, 3, 5, device="meta")
    args: Any = map_arg(node.args, lambda _: probe)
    kwargs: Any = map_arg(node.kwargs, lambda _: probe)
    if node.op == "call_method":
        return bool(getattr(probe, str(node.target))(*args[1:], **kwargs).shape == (2, 5, 3))
    assert callable(node.target)
    return bool(node.target(*args, **kwargs).shape == (2, 5, 3))


def linear_of(module: TracedModule, node: Node) -> nn.Linear | None:
    layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return layer if isinstance(layer, nn.Linear) else None


def refuse_entangled(module: TracedModule, entry: Node, nodes: Sequence[Node]) -> None:
    """Refuse a piece of graph from which more than its last node is read, or whose input is written over.

    Raises:
        Stuck: says which node.
    """
    inside = set(nodes)
    for node in nodes[:-1]:
        if outside := [user for user in node.users if user not in inside]:
            raise Stuck(f"{node.name} inside its mixer is read by {outside[0].name} outside it")
    if overwritten(entry, module) or any(_writes_out(node, inside, module) for node in nodes):
        raise Stuck(f"{entry.name}, which its mixer reads, is written over")


def _writes_out(node: Node, inside: set[Node], module: TracedModule) -> bool:
    sources = node.all_input_nodes
    return changes_in_place(node, module) and bool(sources) and sources[0] not in inside


def _common(paths: Iterable[str]) -> str:
    """The longest path under which all of `paths` stand."""
    first, *rest = (path.split(".") for path in paths)
    for other in rest:
        same = [one == two for one, two in zip(first, other, strict=False)]
        first = first[: same.index(False) if False in same else len(same)]
    return ".".join(first)
