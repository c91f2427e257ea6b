"""The circulant map halved in real arithmetic, level by level.

    x^N - 1 = (x^(N/2) - 1) (x^(N/2) + 1)

so a circulant of size N is a circulant and a skew-circulant of size N/2 on the sum and the difference of the
halves u, v of x, with the sum and the difference of the halves p, q of h:

    a = circulant(p + q) (u + v) / 2      d = skew(p - q) (u - v) / 2      y = [a + d, a - d]

One level halves the multiply-adds; the circulant half can be split again, which takes N^2 towards N^2 / 3.
In two dimensions the height is split and the width stays circular inside the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmkd_fx.passes.mixing.dense import circulant_matrices
from vmkd_fx.passes.mixing.problem import Cost, Realisation, grouped, ungrouped


@dataclass(frozen=True)
class RealSplit(Realisation):
    """`depth` levels: the first axis of the grid is halved so often."""

    depth: int = 1

    @property
    def name(self) -> str:
        return f"real-split {self.depth}"

    def prepare(self, kernel: Tensor) -> tuple[Tensor, ...]:
        """A skew-circulant a level, the largest first, then the circulant that is left: (G, 1, M, M) each."""
        matrices = []
        for _ in range(self.depth):
            first, second = kernel.tensor_split(2, 1)
            matrices.append(circulant_matrices((first - second) / 2, sign=-1))
            kernel = (first + second) / 2
        matrices.append(circulant_matrices(kernel))
        return tuple(matrix.unsqueeze(1) for matrix in matrices)

    def apply(self, x: Tensor, *constants: Tensor) -> Tensor:
        problem = self.problem
        tokens = grouped(x.reshape(-1, problem.tokens, problem.channels), problem)
        mixed = ungrouped(_split(tokens, constants), problem)
        return mixed.reshape(-1, *problem.grid, problem.channels)

    def fits(self, kind: str, version: tuple[int, int] | None = None) -> str | None:
        size = self.problem.grid[0]
        if size % 2**self.depth:
            return f"{size} places cannot be halved {self.depth} times"
        return super().fits(kind, version)

    def cost(self) -> Cost:
        problem = self.problem
        halves = [problem.tokens // 2**level for level in range(1, self.depth + 1)]
        squares = sum(half**2 for half in halves) + halves[-1] ** 2
        moved = 2 * problem.elements
        for half in halves:  # sums, differences and the join of this level
            moved += 12 * problem.batch * half * problem.channels
        return Cost(
            products=problem.batch * problem.channels * squares,
            moved=problem.groups * squares + moved,
            transposed=2 * problem.elements,
            constants=problem.groups * squares,
            operators=3 + 7 * self.depth,
        )


def _split(x: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
    """Mix x (G, B, N, members) by a skew-circulant a level and a circulant at the end."""
    if len(matrices) == 1:
        return torch.matmul(matrices[0], x)
    half = x.shape[2] // 2
    first, second = x.narrow(2, 0, half), x.narrow(2, half, half)
    circular = _split(first + second, matrices[1:])
    skew = torch.matmul(matrices[0], first - second)
    return torch.cat([circular + skew, circular - skew], 2)
