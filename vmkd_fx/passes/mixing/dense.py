"""The circulant map as one matrix product a group, over all tokens of the grid.

y[b, i, c] = sum over j of D[c mod G, i, j] x[b, j, c],   D[g, i, j] = h[g, (j - i) mod N]        (CCS Eq. 7)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmkd_fx.passes.mixing.problem import Cost, Problem, Realisation, grouped, ungrouped


@dataclass(frozen=True)
class Dense(Realisation):
    """Matrices D (G, N, N), N = H W in two dimensions."""

    @property
    def name(self) -> str:
        return "dense"

    def prepare(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return (circulant_matrices(kernel),)

    def apply(self, x: Tensor, *constants: Tensor) -> Tensor:
        (matrices,) = constants
        tokens = x.reshape(-1, self.problem.tokens, self.problem.channels)
        mixed = multiply_groups(matrices, tokens, self.problem)
        return mixed.reshape(-1, *self.problem.grid, self.problem.channels)

    def cost(self) -> Cost:
        problem = self.problem
        constants = problem.groups * problem.tokens**2
        return Cost(
            products=problem.elements * problem.tokens,
            moved=constants + 2 * problem.elements,
            transposed=0 if problem.groups == 1 else 2 * problem.elements,
            constants=constants,
            operators=1 if problem.groups == 1 else 3,
        )


def multiply_groups(matrices: Tensor, x: Tensor, problem: Problem) -> Tensor:
    """Matrices (G, ..., M, M) times x (B, ..., M, C), each to the channels of its group."""
    if problem.groups == 1:
        return torch.matmul(matrices[0], x)
    return ungrouped(torch.matmul(matrices.unsqueeze(1), grouped(x, problem)), problem)


def circulant_matrices(kernel: Tensor, sign: int = 1) -> Tensor:
    """D (G, N, N) with D[g, i, j] = h[g, j - i] for h (G, *grid), N the product of the grid.

    Args:
        kernel: h.
        sign: what a place beyond the edge of the first axis of the grid counts: 1 for a circulant, -1 for a
            skew-circulant. The second axis is always circular.
    """
    first, *rest = kernel.shape[1:]
    place = torch.arange(first)
    step = place[None, :] - place[:, None]  # j - i
    wrapped = torch.where(step < 0, sign, 1).to(kernel.dtype)
    if not rest:
        return kernel[:, step % first] * wrapped
    column = torch.arange(rest[0])
    across = (column[None, :] - column[:, None]) % rest[0]
    found = kernel[:, (step % first)[:, None, :, None], across[None, :, None, :]]
    size = first * rest[0]
    return (found * wrapped[:, None, :, None]).reshape(-1, size, size)
