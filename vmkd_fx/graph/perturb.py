"""Does a branch mix tokens? Answered by the numbers: change one location at its entry and look at the others.

The counterpart of `mixing.py`, which answers from the graph alone. It needs a forward pass in float64 and
sees only what the weights at hand let through.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Interpreter, Node

from vmkd_fx.graph.mixing import Axes, branch_program
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import evaluating
from vmkd_fx.graph.verify import probe_images, randomise_

MOVED = 1e-9
"""Relative to the largest value; in float64 an output that does not depend on a location stays as it is."""


class Perturbed:
    """A model's branches, run on random images and changed locations.

    Every parameter that is all zero, and every scale and shift, is random: behind a fresh zero nothing shows.

    Args:
        module: it stays as it is; a copy is computed with.
    """

    def __init__(self, module: TracedModule, seed: int = 0) -> None:
        self.module = randomise_(copy.deepcopy(module).double(), seed)
        self.images = probe_images(self.module, seed=seed)
        self._nodes = {node.name: node for node in self.module.graph.nodes}

    def mixes(self, branches: Iterable[tuple[Iterable[str], str, Axes]]) -> list[bool]:
        """Whether each branch, given as names of its nodes, its entry and the axes of the locations, mixes
        tokens.
        """
        programs = []
        for names, entry, axes in branches:
            nodes = tuple(self._nodes[name] for name in names)
            programs.append(
                (branch_program(self.module, nodes, self._nodes[entry]), self._nodes[entry], axes)
            )
        with evaluating(self.module), torch.no_grad():
            run = _Forward(self.module, programs)
            run.run(self.images)
        return [run.answers[place] for place in range(len(programs))]


def mixes_when_perturbed(module: TracedModule, nodes: Iterable[Node], entry: Node, axes: Axes) -> bool:
    """Whether changing one location of `entry` changes another at the end of the branch `nodes`."""
    return Perturbed(module).mixes([([node.name for node in nodes], entry.name, axes)])[0]


class _Forward(Interpreter):
    """One forward pass that stops at every entry to try its branch."""

    def __init__(self, module: TracedModule, programs: list[tuple[list[Node], Node, Axes]]) -> None:
        super().__init__(module)
        self.answers: dict[int, bool] = {}
        self.waiting: dict[Node, list[int]] = {}
        self.programs = programs
        self.generator = torch.Generator().manual_seed(0)
        for place, (_, entry, _) in enumerate(programs):
            self.waiting.setdefault(entry, []).append(place)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.env[n] = value
        for place in self.waiting.get(n, ()):
            program, entry, axes = self.programs[place]
            self.answers[place] = bool(program) and self._tries(program, entry, axes)
        return value

    def _tries(self, program: list[Node], entry: Node, axes: Axes) -> bool:
        start = self.env[entry]
        plain = self._replay(program, entry, start)
        moved_by: list[torch.Tensor] = []
        for where in _places(start.shape, axes):
            pushed = start.clone()
            push = 1 + torch.randn(pushed[where].shape, generator=self.generator, dtype=torch.float64)
            pushed[where] += start.std() * push.to(pushed)
            moved = (self._replay(program, entry, pushed) - plain).abs() > MOVED * plain.abs().amax()
            if moved.shape == start.shape:
                moved[where] = False
                if bool(moved.any()):
                    return True
            else:
                if moved.dim() == start.dim():  # two locations may reach one by different channels
                    moved = moved.sum(sorted({*range(moved.dim())} - axes)) > 0
                if any(bool((moved & other).any()) for other in moved_by):
                    return True
                moved_by.append(moved)
        return False

    def _replay(self, program: list[Node], entry: Node, value: torch.Tensor) -> torch.Tensor:
        """The end of the branch for a value at its entry; what is written to in between is a copy."""
        copies: dict[Node, Any] = {entry: value.clone()}

        def read(node: Node) -> Any:
            if node not in copies:
                found = self.env[node]
                copies[node] = found.clone() if isinstance(found, torch.Tensor) else copy.deepcopy(found)
            return copies[node]

        for node in program:
            args = torch.fx.node.map_arg(node.args, read)
            kwargs = torch.fx.node.map_arg(node.kwargs, read)
            copies[node] = getattr(self, node.op)(node.target, args, kwargs)
        return copies[program[-1]]


def _places(shape: torch.Size, axes: Axes) -> list[tuple[slice, ...]]:
    """The corner, the centre and the last location of the first image, and its neighbours along every
    axis and across.
    """
    lengths = {axis: shape[axis] for axis in sorted(axes)}
    points: dict[tuple[tuple[int, int], ...], None] = {}
    for part in (0.0, 0.5, 1.0):
        point = {axis: int(part * (length - 1)) for axis, length in lengths.items()}
        points[tuple(point.items())] = None
        beside = {axis: at + 1 if at + 1 < lengths[axis] else max(at - 1, 0) for axis, at in point.items()}
        for axis, at in beside.items():
            points[tuple({**point, axis: at}.items())] = None
        points[tuple(beside.items())] = None
    every = {axis: slice(None) for axis in range(len(shape))}
    return [
        tuple({**every, 0: slice(0, 1), **{axis: slice(at, at + 1) for axis, at in point}}.values())
        for point in points
    ]
