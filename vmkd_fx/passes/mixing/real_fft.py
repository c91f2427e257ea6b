"""The circulant map by real fast Fourier transforms, which torch has.

X = rfft(x)      Y = conj(rfft(h)) X      y = irfft(Y)                                (CCS Eq. 8, real input)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2

import torch
from torch import Tensor

from vmkd_fx.passes.mixing.problem import Cost, Problem, Realisation


@dataclass(frozen=True)
class RealFFT(Realisation):
    """torch.fft; half precision is transformed in float32.

    Transforms are fast along what lies in one piece of memory, so the channels go first, as the turn of one
    matrix: of all ways to copy it is the one that torch does in blocks.
    """

    @property
    def name(self) -> str:
        return "real-fft"

    def prepare(self, kernel: Tensor) -> tuple[Tensor, ...]:
        """The response of each group, (G, 1, *frequencies, 2), re and im last."""
        return (torch.view_as_real(spectrum(kernel)).unsqueeze(1),)

    def apply(self, x: Tensor, *constants: Tensor) -> Tensor:
        problem, grid = self.problem, self.problem.grid
        axes = tuple(range(-len(grid), 0))
        given = x.new_empty(0)  # x itself will not do: a cast that changes nothing gives the same tensor
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        response = torch.view_as_complex(constants[0].type_as(precise))
        maps = precise.reshape(-1, problem.channels).t().contiguous()
        maps = maps.reshape(problem.members, problem.groups, -1, *grid)
        mixed = torch.fft.irfftn(torch.fft.rfftn(maps, dim=axes) * response, s=list(grid), dim=axes)
        return mixed.reshape(problem.channels, -1).t().reshape(-1, *grid, problem.channels).type_as(given)

    def fits(self, kind: str, version: tuple[int, int] | None = None) -> str | None:
        if kind != "torch":
            return f"{kind} has no complex tensors; 'onnx-dft' and 'matrix-fft' are this in real arithmetic"
        return super().fits(kind, version)

    def cost(self) -> Cost:
        cost = transform_cost(self.problem, self.problem.groups)
        return replace(cost, transposed=self.problem.elements, operators=4)


def transform_cost(problem: Problem, responses: int) -> Cost:
    """Two transforms of real maps and a product of spectra, with so many responses stored."""
    constants = 2 * (problem.tokens // problem.grid[-1]) * (problem.grid[-1] // 2 + 1) * responses
    return Cost(
        transforms=2 * problem.elements * log2(max(problem.tokens, 2)),
        moved=constants + 6 * problem.elements,
        constants=constants,
        operators=3,
    )


def spectrum(kernel: Tensor) -> Tensor:
    """conj(rfft(h)) over the grid of h (G, *grid): (G, *grid with its last axis N // 2 + 1), complex."""
    return torch.fft.rfftn(kernel, dim=tuple(range(1, kernel.ndim))).conj().resolve_conj()
