"""The circulant map as what it is: a convolution with N taps over a circular border, one kernel a group.

y[i] = sum over k of h[k] x~[i + k],   x~ = x with its first N - 1 places once more behind it
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from vmkd_fx.passes.mixing.problem import Cost, Realisation


@dataclass(frozen=True)
class CircularConvolution(Realisation):
    """A depthwise convolution with G channels: the channels of a group go through it as a batch."""

    @property
    def name(self) -> str:
        return "convolution"

    def prepare(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return (kernel.unsqueeze(1).contiguous(),)

    def apply(self, x: Tensor, *constants: Tensor) -> Tensor:
        (taps,) = constants
        problem, axes = self.problem, len(self.problem.grid)
        inner = range(1, 1 + axes)
        maps = x.reshape(-1, *problem.grid, problem.members, problem.groups)
        maps = maps.permute(0, 1 + axes, 2 + axes, *inner).reshape(-1, problem.groups, *problem.grid)
        for axis, size in enumerate(problem.grid, 2):
            if size > 1:
                maps = torch.cat([maps, maps.narrow(axis, 0, size - 1)], axis)
        convolve = F.conv1d if axes == 1 else F.conv2d
        mixed = convolve(maps, taps, groups=problem.groups)
        mixed = mixed.reshape(-1, problem.members, problem.groups, *problem.grid)
        mixed = mixed.permute(0, *range(3, 3 + axes), 1, 2)
        return mixed.reshape(-1, *problem.grid, problem.channels)

    def cost(self) -> Cost:
        problem = self.problem
        constants = problem.groups * problem.tokens
        padded = problem.batch * problem.channels * prod(2 * size - 1 for size in problem.grid)
        return Cost(
            taps=problem.elements * problem.tokens,
            moved=constants + problem.elements + 2 * padded,
            transposed=2 * problem.elements,
            constants=constants,
            operators=3 + 2 * len(problem.grid),
        )
