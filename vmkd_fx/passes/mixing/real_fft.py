"""The circulant map by real fast Fourier transforms, which torch has.

X = rfft(x)      Y = conj(rfft(h)) X      y = irfft(Y)                                (CCS Eq. 8, real input)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor

from vmkd_fx.passes.mixing.problem import Cost, Problem, Realisation, to_channels


@dataclass(frozen=True)
class RealFFT(Realisation):
    """torch.fft; half precision is transformed in float32. The spectrum is held as (..., 2), re and im."""

    @property
    def name(self) -> str:
        return "real-fft"

    def prepare(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return (torch.view_as_real(to_channels(spectrum(kernel), self.problem)).contiguous(),)

    def apply(self, x: Tensor, *constants: Tensor) -> Tensor:
        axes = tuple(range(1, 1 + len(self.problem.grid)))
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        response = torch.view_as_complex(constants[0].to(precise.dtype))
        if len(axes) == 1:
            mixed = torch.fft.irfft(torch.fft.rfft(precise, dim=1) * response, n=self.problem.grid[0], dim=1)
        else:
            mixed = torch.fft.irfft2(
                torch.fft.rfft2(precise, dim=axes) * response, s=list(self.problem.grid), dim=axes
            )
        return mixed.to(x.dtype)

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
        moved=constants + 8 * problem.elements,
        constants=constants,
        operators=3,
    )


def spectrum(kernel: Tensor) -> Tensor:
    """conj(rfft(h)) over the grid of h (G, *grid): (G, *grid with its last axis N // 2 + 1), complex."""
    return torch.fft.rfftn(kernel, dim=tuple(range(1, kernel.ndim))).conj().resolve_conj()
