"""Shapes in a graph of ATen operators, kept up while it is rewritten, and which axis grows with the batch.

Each value is evaluated without numbers for batches of two and of three images: what differs between the two
is the batch. The result stays at its node, so a copy of the graph has it too, and the same call of another
node, in this graph or any other, is not evaluated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from vmkd_fx.graph.rules import Sized, sized
from vmkd_fx.graph.shapes import counting
from vmkd_fx.graph.values import attribute, image_form

BATCHES = (2, 3)

_HELD, _WORK = "vmkd_held", "vmkd_work"

_found: dict[str, Any] = {}
_worked: dict[str, int] = {}
_MOST = 20_000
"""Calls that are remembered, some ten megabytes."""


class Sizes:
    """What the nodes under `root` hold for images of one size.

    Args:
        root: holds the tensors that `get_attr` nodes name, and says what its images are.
        size: (C, H, W) of an image.
    """

    def __init__(self, root: nn.Module, size: tuple[int, ...]) -> None:
        self._root = root
        self._shape, self._dtype = image_form(root, size)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def held(self, node: Node) -> tuple[Any, Any]:
        """The value of `node` for two and for three images; tensors are `Sized`."""
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [source for source in current.all_input_nodes if _HELD not in source.meta]
            if missing:
                pending += missing
                continue
            if _HELD not in current.meta:
                current.meta[_HELD] = tuple(self._evaluated(current, index) for index in range(len(BATCHES)))
            pending.pop()
        held: tuple[Any, Any] = node.meta[_HELD]
        return held

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape for a batch of two."""
        return tuple(self.held(node)[0].shape)

    def batched(self, node: Node) -> int | None:
        """The axis that grows with the batch; None for what no image reaches."""
        two, three = self.held(node)
        edges = enumerate(zip(two.shape, three.shape, strict=True))
        return next((axis for axis, (one, other) in edges if one != other), None)

    def multiply_adds(self, graph: Graph) -> int:
        """For one image, by the rule of `vmkd_fx.graph.shapes`."""
        for node in graph.nodes:
            if _WORK not in node.meta:
                self.held(node)
                node.meta[_WORK] = self._work(node)
        return sum(node.meta[_WORK] for node in graph.nodes) // BATCHES[0]

    def _work(self, node: Node) -> int:
        if node.op != "call_function":
            return 0
        key, args, kwargs = self._call(node, 0)
        if key not in _worked:
            with counting() as counter, self._mode, torch.no_grad():
                args, kwargs = (tree_map_only(Sized, _empty, given) for given in (args, kwargs))
                node.target(*args, **kwargs)  # type: ignore[operator]
            _remember(_worked, key, counter.get_total_flops() // 2)
        return _worked[key]

    def _call(self, node: Node, index: int) -> tuple[str, Any, Any]:
        """The node's arguments for one of the batches, and a text that is the same for the same call."""
        args: Any
        args, kwargs = (
            map_arg(given, lambda source: source.meta[_HELD][index]) for given in (node.args, node.kwargs)
        )
        blocks = [_text(given) for given in args if isinstance(given, GraphModule)]
        return f"{node.target} {args} {kwargs} {blocks}", args, kwargs

    def _evaluated(self, node: Node, index: int) -> Any:
        if node.op == "placeholder":
            return Sized(torch.Size((BATCHES[index], *self._shape)), self._dtype, torch.device("cpu"))
        if node.op == "get_attr":
            return tree_map_only(torch.Tensor, sized, attribute(self._root, str(node.target)))
        key, args, kwargs = self._call(node, index)
        if key not in _found:
            with self._mode, torch.no_grad():
                args, kwargs = (tree_map_only(Sized, _empty, given) for given in (args, kwargs))
                value = node.target(*args, **kwargs) if node.op == "call_function" else args[0]  # type: ignore[operator]
            _remember(_found, key, tree_map_only(torch.Tensor, sized, value))
        return _found[key]


def _text(block: GraphModule) -> str:
    """What a block under autocast does: it prints as its class alone."""
    codes = [part.code for part in block.modules() if isinstance(part, GraphModule)]
    return f"{codes} {[sized(tensor) for tensor in block.state_dict().values()]}"


def _remember(memory: dict[str, Any], key: str, value: Any) -> None:
    if len(memory) >= _MOST:
        memory.clear()
    memory[key] = value


def _empty(held: Sized) -> torch.Tensor:
    return torch.empty(held.shape, dtype=held.dtype, device=held.device)


def forget(node: Node) -> None:
    """Drop what was found of a node, which is of another precision now."""
    for key in (_HELD, _WORK):
        node.meta.pop(key, None)
