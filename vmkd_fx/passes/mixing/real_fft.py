"""The circulant map by real fast Fourier transforms, which torch has.

X = rfft(x)      Y = conj(rfft(h)) X      y = irfft(Y)                                (CCS Eq. 8, real input)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor

from vmkd_fx.passes.mixing.problem import Cost, Problem, Realisation


@dataclass(frozen=True)
class RealFFT(Realisation):
    """torch.fft; half precision is transformed in float32.

    A transform over tokens leaves each channel's spectrum in one piece of memory, whatever its shape says, so
    the response lies like that too: multiplying numbers that lie in another order takes three times as long.
    """

    @property
    def name(self) -> str:
        return "real-fft"

    def prepare(self, kernel: Tensor) -> tuple[Tensor, ...]:
        """The response of each channel, (C, *frequencies, 2), re and im last."""
        response = spectrum(kernel)
        return (torch.view_as_real(torch.cat([response] * self.problem.members)),)

    def apply(self, x: Tensor, *constants: Tensor) -> Tensor:
        grid = self.problem.grid
        axes = tuple(range(1, 1 + len(grid)))
        given = x.new_empty(0)  # x itself will not do: a cast that changes nothing gives the same tensor
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        response = torch.view_as_complex(constants[0].type_as(precise)).movedim(0, -1)
        mixed = torch.fft.rfftn(precise, dim=axes) * response
        return torch.fft.irfftn(mixed, s=list(grid), dim=axes).type_as(given)

    def fits(self, kind: str, version: tuple[int, int] | None = None) -> str | None:
        if kind != "torch":
            return f"{kind} has no complex tensors; 'onnx-dft' and 'matrix-fft' are this in real arithmetic"
        return super().fits(kind, version)

    def cost(self) -> Cost:
        return transform_cost(self.problem)


def transform_cost(problem: Problem) -> Cost:
    """Two transforms of real maps and a product of spectra."""
    constants = 2 * (problem.tokens // problem.grid[-1]) * (problem.grid[-1] // 2 + 1) * problem.channels
    return Cost(
        transforms=2 * problem.elements * log2(max(problem.tokens, 2)),
        moved=constants + 6 * problem.elements,
        constants=constants,
        operators=3,
    )


def spectrum(kernel: Tensor) -> Tensor:
    """conj(rfft(h)) over the grid of h (G, *grid): (G, *grid with its last axis N // 2 + 1), complex."""
    return torch.fft.rfftn(kernel, dim=tuple(range(1, kernel.ndim))).conj().resolve_conj()
