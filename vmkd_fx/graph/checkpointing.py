"""Gradient checkpointing of a flat graph: blocks run again in the backward pass instead of being kept (Chen
et al. 2016, arXiv:1604.06174).

    y = f_n(... f_1(x)): keep the x that enters each f_i, and compute what lies inside f_i once more for its
    gradient

The graph stays whole; only the compiled forward is cut into runs of nodes. Whatever a run reads from outside
is its input and whatever is read later its output, so any cut computes the same, bit for bit: where the
blocks are decides about memory alone. A run that cannot be repeated is kept as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, GraphModule, Node
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.fx.graph_module import _forward_from_src
from torch.utils.checkpoint import checkpoint

from vmkd_fx.errors import MatchError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.edit import changes_in_place
from vmkd_fx.graph.traced import TracedModule

Ends = Sequence[tuple[str, str]]
"""Of each block, the names of the nodes that enter and leave it."""


@dataclass(frozen=True)
class Segment:
    """A run of nodes as one function `run(module, *values of reads) -> values of writes`.

    Attributes:
        run: the function; for the graph's last run it returns what the graph returns.
        reads, writes: names of the nodes that enter and leave it.
        modules: paths of the modules that it calls.
        holders: paths of the modules whose parameters or buffers it reads itself.
        repeatable: whether it is a block, and running it twice computes the same twice.
    """

    run: Callable[..., Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    modules: tuple[str, ...]
    holders: tuple[str, ...]
    repeatable: bool


def find_blocks(module: TracedModule) -> tuple[tuple[str, str], ...]:
    """The ends of the module's blocks.

    Raises:
        MatchError: the model has no blocks, or none that can be run twice.
    """
    blocks = tuple((block.input, block.output) for block in anatomy(module).blocks)
    if not any(segment.repeatable for segment in cut(module, blocks)):
        found = (
            f"none of the {len(blocks)} found can: each writes over what enters it, or switches the precision"
            if blocks
            else "none is found in this model"
        )
        raise MatchError(
            f"{module.info.name}: set_grad_checkpointing() runs residual blocks again in the backward pass, "
            f"and {found}; to save memory, train it as it is under torch.autocast or on smaller batches"
        )
    return blocks


def cut(module: GraphModule, blocks: Ends) -> list[Segment]:
    """The graph in runs: up to the first block, one for each block with what leads up to it, and the rest.

    Blocks that the graph no longer holds are left out.
    """
    nodes = list(module.graph.nodes)
    order = {node.name: index for index, node in enumerate(nodes)}
    held = [(order[first], order[last]) for first, last in blocks if {first, last} <= order.keys()]
    if not held:
        return []
    inputs = sum(node.op == "placeholder" for node in nodes)
    start = max(min(first for first, _ in held), inputs - 1)
    stops = [-1, start, *sorted({last for _, last in held}), len(nodes) - 1]
    runs = [nodes[first + 1 : last + 1] for first, last in pairwise(stops)]
    return [_segment(module, run, 0 < index < len(runs) - 1) for index, run in enumerate(runs)]


def checkpointed_forward(module: GraphModule, blocks: Ends) -> Callable[..., Any]:
    """The forward that keeps no block's insides while training; elsewhere the one that `module` has."""
    plain = type(module).forward
    segments = cut(module, blocks)
    if not segments:
        return plain
    head, *body, tail = segments

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training or not torch.is_grad_enabled() or is_fx_symbolic_tracing():
            return plain(self, *args, **kwargs)
        values = dict(zip(head.writes, head.run(self, *args, **kwargs), strict=True))
        for segment in body:
            results = _run(segment, self, *(values[name] for name in segment.reads))
            values.update(zip(segment.writes, results, strict=True))
        return tail.run(self, *(values[name] for name in tail.reads))

    return forward


def _run(segment: Segment, module: nn.Module, *values: Any) -> Any:
    if not segment.repeatable:
        return segment.run(module, *values)
    if torch.compiler.is_compiling():  # which repeats no write into a buffer, and takes no such context
        return checkpoint(segment.run, module, *values, use_reentrant=False)
    contexts = functools.partial(_contexts, module, segment)
    return checkpoint(segment.run, module, *values, use_reentrant=False, context_fn=contexts)


class _BuffersAsTheyWere:
    """While the block runs again, its modules hold copies of the buffers from before it ran first.

    So running statistics are updated once, and what depends on them is computed from the same values. The
    buffers themselves stay where they are, untouched.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.before = [
            (part._buffers, name, buffer.detach().clone())
            for part in modules
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]

    def __enter__(self) -> None:
        self.present = [(buffers, name, buffers[name]) for buffers, name, _ in self.before]
        for buffers, name, value in self.before:
            buffers[name] = value.clone()

    def __exit__(self, *_: object) -> None:
        for buffers, name, value in self.present:
            buffers[name] = value


def _contexts(module: nn.Module, segment: Segment) -> tuple[Any, Any]:
    called = [part for path in segment.modules for part in module.get_submodule(path).modules()]
    holders = [module.get_submodule(path) for path in segment.holders]
    return nullcontext(), _BuffersAsTheyWere(dict.fromkeys([*called, *holders]))


def _segment(module: GraphModule, run: list[Node], block: bool) -> Segment:
    inside = {node: None for node in run if node.op != "get_attr"}  # a parameter is read anew in each run
    sources = dict.fromkeys(source for node in inside for source in node.all_input_nodes)
    tensors = [source for source in sources if source.op == "get_attr"]
    reads = [source for source in sources if source.op != "get_attr" and source not in inside]
    writes = [node for node in inside if not node.users.keys() <= inside.keys()]
    graph = Graph()
    copies = {source: graph.placeholder(source.name) for source in reads}
    for node in (*tensors, *inside):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    if run[-1].op != "output":
        graph.output(tuple(copies[node] for node in writes))
    code = graph.python_code("self")
    return Segment(
        _forward_from_src(code.src, code.globals),
        tuple(node.name for node in reads),
        tuple(node.name for node in writes),
        tuple({str(node.target): None for node in inside if node.op == "call_module"}),
        tuple({str(node.target).rpartition(".")[0]: None for node in tensors}),
        block and not any(map(_once_only, inside)) and not any(_overwritten(node, module) for node in reads),
    )


def _once_only(node: Node) -> bool:
    """Running again stops at the last value needed, which would leave a precision switched on."""
    return node.target in (_enter_autocast, _exit_autocast)


def _overwritten(value: Node, module: GraphModule) -> bool:
    """Whether what enters a block is gone by the backward pass. Autograd refuses the same through a view."""
    return any(changes_in_place(user, module) and user.args[:1] == (value,) for user in value.users)
