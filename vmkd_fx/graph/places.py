"""Places in a model by name: "the last block", "two thirds of the depth", "stage 2", "blocks.*.mlp".

| written as | means |
| --- | --- |
| `7`, `-1`, `"-1"`, `"2/3"` | what a block leaves: from 0, from the end, by its share of the depth |
| `"block 3"`, `"block *"` | the same, in words; all blocks |
| `"stage 2"`, `"stage -1"`, `"stage *"` | what a stage leaves, counted from 0 |
| `"block 3 branch 1"` | the end of a residual branch, before it is added |
| `"block 3 work 1"` | the same, before layer scale, drop path and dropout |
| `"block 3 norm 0"` | the norm that such a branch starts with |
| `"final"` | what the last block leaves, behind the norm that follows it |
| `"blocks.3.mlp"`, `"layer4"` | what a module returns |
| `"blocks.*.norm1"` | every module whose path fits the pattern |
| `"add_5"` | a node of the graph |
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch.fx import Node

from vmkd_fx.errors import MatchError, UnknownNameError
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.traced import TracedModule

_WORDS = re.compile(r"(?:(block|stage)\s+)?(\*|-?\d+(?:/\d+)?)(?:\s+(branch|work|norm)\s+(\*|-?\d+))?")


@dataclass(frozen=True)
class Place:
    """A value in the graph: the name under which it was found, and its node."""

    name: str
    node: Node


def find_places(module: TracedModule, known: Anatomy, where: int | str) -> list[Place]:
    """The values that `where` names, in the order of the graph; several for a pattern.

    Raises:
        MatchError: the model has no such block, stage, branch or norm.
        UnknownNameError: it has no such module and no such node; the error names those nearest in spelling.
    """
    words = _WORDS.fullmatch(str(where).strip())
    if words is not None:
        nodes = {node.name: node for node in module.graph.nodes}
        places = [Place(name, nodes[node]) for name, node in _by_number(known, *words.groups(), where=where)]
        if not places:
            raise MatchError(
                f"place {where!r} fits nothing: {known.model} has {len(known.blocks)} blocks in "
                f"{len(known.stages)} stages, and no branch of theirs has that; see vmkd inspect"
            )
        return places
    text = str(where)
    if text == "final" and known.final:
        return [Place("final", next(node for node in module.graph.nodes if node.name == known.final))]
    returned = module_outputs(module)
    if any(mark in text for mark in "*?["):
        found = [Place(path, node) for path, node in returned.items() if fnmatchcase(path, text)]
        if not found:
            raise UnknownNameError("module that fits", text, returned, known.model)
        order = {node: index for index, node in enumerate(module.graph.nodes)}
        return sorted(found, key=lambda place: order[place.node])
    if text in returned:
        return [Place(text, returned[text])]
    nodes = {node.name: node for node in module.graph.nodes if node.op not in ("get_attr", "output")}
    if text not in nodes:
        raise UnknownNameError("module or node", text, {*returned, *nodes}, known.model)
    return [Place(text, nodes[text])]


def module_outputs(module: TracedModule) -> dict[str, Node]:
    """What each module returns, by path: of a call that returns one value, the last such call."""
    nodes = {node.name: node for node in module.graph.nodes}
    found = {
        path: nodes[call.outputs[0]]
        for path, calls in module.calls.items()
        for call in calls
        if len(call.outputs) == 1 and call.outputs[0] in nodes
    }
    return found | {str(node.target): node for node in nodes.values() if node.op == "call_module"}


def _by_number(
    known: Anatomy, kind: str | None, index: str, part: str | None, number: str | None, *, where: int | str
) -> Iterator[tuple[str, str]]:
    """Names of places and of nodes for a place given by numbers."""
    if kind == "stage":
        if part is not None:
            raise MatchError(f"place {where!r}: branches and norms belong to a block: 'block 3 {part} 0'")
        for i in _chosen(index, len(known.stages), f"{known.model} has no stage {index}", "stages"):
            yield f"stage {i}", known.stages[i].output
        return
    for i in range(len(known.blocks)) if index == "*" else (known.position(index),):
        block = known.blocks[i]
        if part is None or number is None:
            yield f"block {i}", block.output
            continue
        missing = f"block {i} of {known.model} ({block.path}) has no branch {number}"
        for j in _chosen(number, len(block.branches), missing, "branches"):
            branch = block.branches[j]
            node = {"branch": branch.end, "work": branch.work, "norm": branch.norm}[part]
            if node is None and "*" not in (index, number):
                raise MatchError(
                    f"branch {j} of block {i} of {known.model} ({block.path}) starts without a norm"
                )
            if node is not None:
                yield f"block {i} {part} {j}", node


def _chosen(index: str, count: int, missing: str, what: str) -> range:
    """The indices that "*" or a number stands for."""
    if index == "*":
        return range(count)
    if "/" in index or not -count <= int(index) < count:
        raise MatchError(f"{missing}; it has {count} {what}, 0 to {count - 1}")
    return range(int(index) % count, int(index) % count + 1)
