"""Does a piece of graph mix tokens? Answered from what its operations do with the locations.

A branch mixes tokens when changing one location of its input changes another of its output. The branch is run
on location numbers instead of data (`locations.py`): it mixes when some element comes to depend on two
locations, or on one that is not its own. Neither weights nor images are needed, nor a name of a class.
`perturb.py` asks the same of the numbers that the model computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Node
from torch.fx.node import map_arg

from vmkd_fx.graph.edit import changes_in_place, is_view
from vmkd_fx.graph.locations import (
    OWN_MEMORY,
    Located,
    Mixed,
    NotUnderstood,
    Written,
    gather,
    nowhere,
    number_locations,
)
from vmkd_fx.graph.shapes import Shape
from vmkd_fx.graph.share import shared_view
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import attribute, evaluating, reference_tensor

Axes = frozenset[int]

_WITHOUT_VALUE = (_enter_autocast, _exit_autocast, torch._assert)


@dataclass(frozen=True)
class Mixing:
    """The verdict on a branch: whether it mixes tokens (None: an operation was not understood) and by
    what.
    """

    mixes: bool | None
    by: str = ""


def mixes_tokens(
    module: TracedModule, shapes: Mapping[Node, Shape], nodes: Iterable[Node], entry: Node, axes: Axes
) -> Mixing:
    """Whether the branch `nodes`, which reads `entry` with locations on `axes`, mixes tokens.

    What the branch reads besides is taken as given.
    """
    program = branch_program(module, tuple(nodes), entry)
    if not program:
        return Mixing(False)
    start = number_locations(shapes[entry], axes)
    try:
        end = _run(module, shapes, program, entry, start)
    except Mixed as answer:
        return Mixing(True, str(answer))
    except NotUnderstood as answer:
        return Mixing(None, str(answer))
    if not isinstance(end, torch.Tensor):
        return Mixing(None, "the branch ends in no tensor")
    if not isinstance(end, Located):
        return Mixing(False)
    return Mixing(False) if in_place(end.locations, start) else Mixing(True, "tokens change places")


def in_place(end: torch.Tensor, start: torch.Tensor) -> bool:
    """Whether what leaves a branch at each location comes from there.

    In another layout or at another resolution it is enough that the locations come in the same order: as a
    sequence, or along every axis.
    """
    if end.shape == start.shape:
        return bool(((end == start) | (end == 0)).all())
    end, start = _without_channels(end), _without_channels(start)
    found = end.flatten()
    found = found[found != 0]
    if bool((found[1:] > found[:-1]).all()):
        return True
    grid, end = [length for length in start.shape if length > 1], end.squeeze()
    if len(grid) != end.ndim or bool((end == 0).any()):
        return False
    places = torch.unravel_index(end.long() - 1, grid)
    steps = [(axis, own, at.diff(dim=axis)) for own, at in enumerate(places) for axis in range(end.ndim)]
    return all(bool((step >= 0).all() if axis == own else (step == 0).all()) for axis, own, step in steps)


def _without_channels(numbers: torch.Tensor) -> torch.Tensor:
    """Length one on every axis along which the location stays the same."""
    for axis in range(numbers.ndim):
        try:
            numbers = gather(numbers, (axis,), "")
        except Mixed:
            continue
    return numbers


def branch_program(module: TracedModule, nodes: tuple[Node, ...], entry: Node) -> list[Node]:
    """What has to run behind `entry` to compute the last of `nodes`, in order: they, what they read that is
    computed later than `entry`, and what writes into any of it.
    """
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    behind = [node for node in nodes if order[node] > order[entry]]
    if not behind:
        return []
    last = max(behind, key=order.__getitem__)
    writers = writers_between(module, entry, last)
    needed = {*behind, *writers.get(entry, ())}
    todo = [*needed]
    while todo:
        node = todo.pop()
        for other in (*node.all_input_nodes, *writers.get(node, ())):
            if other not in needed and order[other] > order[entry]:
                needed.add(other)
                todo.append(other)
    return sorted(needed, key=order.__getitem__)


def writers_between(module: TracedModule, first: Node, last: Node) -> dict[Node, list[Node]]:
    """The nodes between two that write into each node's value, directly or through a view of it."""
    found: dict[Node, list[Node]] = {}
    node = first.next
    while node is not last:
        target = node.args[0] if node.args else None
        if node.op != "get_attr" and isinstance(target, Node) and changes_in_place(node, module):
            while isinstance(target, Node):
                found.setdefault(target, []).append(node)
                target = target.args[0] if is_view(target) and target.args else None
        node = node.next
    return found


def _run(
    module: TracedModule, shapes: Mapping[Node, Shape], program: list[Node], entry: Node, start: torch.Tensor
) -> Any:
    """What the branch ends in."""
    with torch.no_grad():
        try:
            return _Run(module, shapes, program, entry, start).of(program[-1])
        except Written:
            pass
        token = OWN_MEMORY.set(True)
        try:
            return _Run(module, shapes, program, entry, start.clone()).of(program[-1])
        finally:
            OWN_MEMORY.reset(token)


class _Run:
    """The branch on location numbers. A value from outside has its shape and no data, unless it is made of
    parameters, buffers and numbers alone: then it is computed, for it may be an index.
    """

    def __init__(
        self,
        module: TracedModule,
        shapes: Mapping[Node, Shape],
        program: list[Node],
        entry: Node,
        numbers: torch.Tensor,
    ) -> None:
        self.module, self.shapes = module, shapes
        self.reference = reference_tensor(module)
        self.written = set(writers_between(module, entry, program[-1].next))
        self.known: dict[Node, Any] = {entry: Located(numbers, self.reference.dtype, self.reference.device)}
        self.from_images: set[Node] = set()
        for node in program:
            self.of(node)

    def of(self, node: Node) -> Any:
        """The node's value."""
        todo = [node]
        while todo:
            current = todo[-1]
            missing = [source for source in current.all_input_nodes if source not in self.known]
            if missing:
                todo += missing
                continue
            if current not in self.known:
                value = self._compute(current)
                is_plain = isinstance(value, torch.Tensor) and not isinstance(value, Located)
                self.known[current] = nowhere(value) if is_plain and current in self.written else value
            todo.pop()
        return self.known[node]

    def _compute(self, node: Node) -> Any:
        if node.op == "placeholder" or self._reads_images(node):
            self.from_images.add(node)
            if node in self.shapes:
                return torch.zeros(
                    self.shapes[node], dtype=self.reference.dtype, device=self.reference.device
                )
        if node.op == "get_attr":
            return attribute(self.module, str(node.target))
        if node.target in _WITHOUT_VALUE:
            return None
        args = map_arg(node.args, self.known.__getitem__)
        kwargs: dict[str, Any] = map_arg(node.kwargs, self.known.__getitem__)
        try:
            return self._call(node, args, kwargs)
        except (Mixed, NotUnderstood, Written):
            raise
        except Exception as error:
            what = getattr(node.target, "__name__", node.target)
            raise NotUnderstood(f"{what} is not understood: {str(error).splitlines()[0][:100]}") from error

    def _call(self, node: Node, args: Any, kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            target = self.module.get_submodule(str(node.target))
            if not type(target).__module__.startswith("torch.nn"):
                target = shared_view(target, throwaway=True)  # it may keep what it computed
            with evaluating(target):
                return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _reads_images(self, node: Node) -> bool:
        """Whether a value depends on the images' data, and on no location of the branch."""
        values = [self.known[source] for source in node.all_input_nodes]
        if any(isinstance(item, Located) for value in values for item in _flat(value)):
            return False
        asks = node.target is getattr or str(node.target) in ("size", "dim")
        return not asks and any(source in self.from_images for source in node.all_input_nodes)


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
