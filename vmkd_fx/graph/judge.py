"""The mixing verdict of many branches: those that are alike share one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from vmkd_fx.graph.joins import DataFlow
from vmkd_fx.graph.mixing import Axes, Mixing, mixes_tokens
from vmkd_fx.graph.traced import TracedModule


class Judge:
    """Asks `mixes_tokens` once for all branches of the same operations, settings, shapes and index tables."""

    def __init__(self, module: TracedModule, flow: DataFlow) -> None:
        self.module = module
        self.flow = flow
        self.shapes = flow.shapes
        self._modules = dict(module.named_modules())
        self._known: dict[Hashable, Mixing] = {}

    def __call__(self, nodes: Sequence[Node], entry: Node, axes: Axes) -> Mixing:
        """Whether the branch `nodes`, which reads `entry` with locations on `axes`, mixes tokens."""
        if prod(self.shapes[entry][axis] for axis in axes) == 1:
            return Mixing(False)
        try:
            key = self._signature(nodes, entry, axes)
        except _OnItsOwn:
            return mixes_tokens(self.module, self.shapes, nodes, entry, axes)
        if key not in self._known:
            self._known[key] = mixes_tokens(self.module, self.shapes, nodes, entry, axes)
        return self._known[key]

    def _signature(self, nodes: Sequence[Node], entry: Node, axes: Axes) -> Hashable:
        """Everything that the verdict depends on, with nodes by their place in the branch."""
        places: dict[Node, Hashable] = {node: place for place, node in enumerate((entry, *nodes))}

        steps = tuple((*self._step(node, places), self.shapes.get(node)) for node in nodes)
        return self.shapes.get(entry), axes, steps

    def _step(self, node: Node, places: Mapping[Node, Hashable]) -> tuple[Hashable, ...]:
        def freeze(value: Any) -> Hashable:
            if isinstance(value, Node):
                return places[value] if value in places else self._outside(value)
            if isinstance(value, (tuple, list)):
                return tuple(freeze(item) for item in value)
            if isinstance(value, slice):
                return ("slice", freeze(value.start), freeze(value.stop), freeze(value.step))
            if isinstance(value, dict):
                return tuple((name, freeze(item)) for name, item in value.items())
            return (type(value), value)

        return node.op, self._target(node), freeze(node.args), freeze(node.kwargs)

    def _target(self, node: Node) -> Hashable:
        if node.op != "call_module":
            return node.target
        return tuple(
            (name, type(part), _settings(part))
            for name, part in self._modules[str(node.target)].named_modules()
        )

    def _outside(self, node: Node) -> Hashable:
        """What a branch reads besides its entry: a tensor of the model by shape and, of integers, content;
        what is computed from such tensors and from lengths by how; what is computed from the images by name.
        """
        if node in self.flow:
            return node.name
        if node.op != "get_attr":
            lengths = {
                source: self.shapes.get(source) for source in node.all_input_nodes if source in self.flow
            }
            return self._step(node, lengths)
        parent, _, name = str(node.target).rpartition(".")
        tensor = getattr(self._modules[parent], name)
        if isinstance(tensor, nn.Module):  # of which a method is called
            return str(node.target)
        if tensor.is_floating_point() or tensor.is_meta:
            return tuple(tensor.shape), tensor.dtype, tensor.is_meta
        return tuple(tensor.shape), tensor.dtype, tensor.detach().cpu().contiguous().numpy().tobytes()


def _settings(part: nn.Module) -> Hashable:
    """A module's own plain attributes; of a rate only whether it is zero; others by identity."""
    found = []
    for name, value in vars(part).items():
        if name.startswith("_") or name == "training":
            continue
        if isinstance(value, Tensor):
            raise _OnItsOwn
        if isinstance(value, float):
            value = value == 0
        plain = isinstance(value, (bool, int, str, type(None), torch.Size, torch.dtype))
        numbers = isinstance(value, tuple) and all(isinstance(item, (int, float, str)) for item in value)
        found.append((name, value if plain or numbers else id(value)))
    return tuple(found), tuple(
        (name, tuple(p.shape)) for name, p in part._parameters.items() if p is not None
    )


class _OnItsOwn(Exception):  # noqa: N818 (no failure: a branch that shares with none)
    pass
