"""The circulant map by Fourier transforms written as matrix products, which every engine has.

N = n1 n2 ... nk; each factor is one batched product with matrices of size 2 n (`waves`), there and back:

    multiply-adds a number of x:  2 (n1 + 2 n2 + ... + 2 nk)   against N for the dense product

and no other operator than Reshape, MatMul, Mul, Slice and Add: the twiddle factors are in the matrices, and
the order of the axes is such that nothing is transposed. On a grid of two axes the factors of the height come
first, then those of the width.

`Partial` stops before the last factor and multiplies what is left of each sequence by a dense matrix a group:
the map's block there, of size 2 nk. That spares the last transform, its inverse and the product of spectra

    2 (n1 + ... + 2 n(k-1)) + 2 nk

for two transposes and constants of 2 G N nk numbers (it divides x^N - 1 by x^nk - omega for the roots omega).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from vmkd_fx.errors import ModelError
from vmkd_fx.passes.mixing.dense import multiply_groups
from vmkd_fx.passes.mixing.problem import Cost, Problem, Realisation, to_channels
from vmkd_fx.passes.mixing.waves import Pair, first_step, next_step, responses

Factors = tuple[tuple[int, ...], ...]
"""For each axis of the grid, factors whose product is its size."""


@dataclass(frozen=True)
class MatrixFFT(Realisation):
    """Transforms, a product of spectra, transforms back.

    Attributes:
        factors: of each axis of the grid, the outermost first.

    Raises:
        ModelError: the factors do not make up the grid.
    """

    factors: Factors

    def __post_init__(self) -> None:
        if tuple(map(prod, self.factors)) != self.problem.grid:
            raise ModelError(f"factors {self.factors} do not multiply to the grid {self.problem.grid}")

    @property
    def name(self) -> str:
        return f"matrix-fft {written(self.factors)}"

    def prepare(self, kernel: Tensor) -> tuple[Tensor, ...]:
        """The matrices there, those back in the same order, and the two factors of the spectra."""
        forward, backward, pairs = transforms(self.factors)
        values = [to_channels(part.movedim(-1, 0), self.problem) for part in responses(pairs, _whole(kernel))]
        return tuple(constant.to(kernel.dtype) for constant in (*forward, *backward, *values))

    def apply(self, x: Tensor, *constants: Tensor) -> Tensor:
        sizes = [n for axis in self.factors for n in axis]
        channels, steps = self.problem.channels, len(sizes)
        direct, crossed = constants[-2:]
        waves = go(x, constants[:steps], sizes, channels)
        waves = waves.reshape(-1, direct.shape[0], 2, channels)
        waves = waves * direct + waves.flip(2) * crossed
        mixed = go_back(waves, constants[steps : 2 * steps], sizes, channels)
        return mixed.reshape(-1, *self.problem.grid, channels)

    def fits(self, kind: str, version: tuple[int, int] | None = None) -> str | None:
        if self.problem.tokens == 1:
            return "one place has nothing to transform"
        return super().fits(kind, version)

    def cost(self) -> Cost:
        sizes = [n for axis in self.factors for n in axis]
        steps = step_costs(self.problem, sizes)
        columns = prod_pairs(sizes) * 2 * self.problem.channels
        return Cost(
            products=2 * sum(products for products, _, _ in steps),
            moved=2 * sum(moved for _, moved, _ in steps) + (2 + 8 * self.problem.batch) * columns,
            constants=2 * sum(stored for _, _, stored in steps) + 2 * columns,
            operators=2 * len(steps) + 4,
        )


@dataclass(frozen=True)
class Partial(Realisation):
    """Transforms over all factors but the last, a dense block for each pair and group, transforms back.

    Attributes:
        factors: as for `MatrixFFT`; at least two in all.

    Raises:
        ModelError: the factors do not make up the grid, or there is one only, which is the dense product.
    """

    factors: Factors

    def __post_init__(self) -> None:
        if tuple(map(prod, self.factors)) != self.problem.grid or sum(map(len, self.factors)) < 2:
            raise ModelError(
                f"factors {self.factors} are not two or more that multiply to the grid {self.problem.grid}"
            )

    @property
    def name(self) -> str:
        return f"partial-fft {written(self.factors)}"

    def prepare(self, kernel: Tensor) -> tuple[Tensor, ...]:
        """The matrices there, those back, and the blocks (G, pairs, 2n, 2n)."""
        forward, backward, pairs = transforms(self.factors)
        direct, crossed = (part.movedim(-1, 0) for part in responses(pairs, _whole(kernel)))
        shape = (len(direct), *forward[-1].shape[:2])
        there = forward[-1].to(kernel.dtype)
        crossing = there.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
        inside = direct.reshape(shape).unsqueeze(-1) * there + crossed.reshape(shape).unsqueeze(-1) * crossing
        blocks = torch.matmul(backward[-1].to(kernel.dtype), inside)
        kept = (*forward[:-1], *backward[:-1], blocks)
        return tuple(constant.to(kernel.dtype).contiguous() for constant in kept)

    def apply(self, x: Tensor, *constants: Tensor) -> Tensor:
        *sizes, last = (n for axis in self.factors for n in axis)
        problem, steps = self.problem, len(sizes)
        blocks = constants[-1]
        waves = go(x, constants[:steps], sizes, last * problem.channels)
        waves = multiply_groups(blocks, waves.reshape(-1, *blocks.shape[1:3], problem.channels), problem)
        mixed = go_back(waves, constants[steps : 2 * steps], sizes, last * problem.channels)
        return mixed.reshape(-1, *problem.grid, problem.channels)

    def cost(self) -> Cost:
        *sizes, last = (n for axis in self.factors for n in axis)
        problem = self.problem
        steps = step_costs(problem, sizes, last)
        blocks = problem.groups * prod_pairs(sizes) * (2 * last) ** 2
        return Cost(
            products=2 * sum(products for products, _, _ in steps) + problem.batch * problem.members * blocks,
            moved=2 * sum(moved for _, moved, _ in steps) + blocks + 2 * problem.elements,
            transposed=0 if problem.groups == 1 else 2 * problem.elements,
            constants=2 * sum(stored for _, _, stored in steps) + blocks,
            operators=2 * len(steps) + (1 if problem.groups == 1 else 3),
        )


def transforms(factors: Factors) -> tuple[list[Tensor], list[Tensor], tuple[Pair, ...]]:
    """The matrices there and back, a tensor a factor, and the pairs at the end.

    The first is (2 pairs, n), later ones are (pairs, 2n, 2n); those back are the inverse of each.
    """
    forward, backward = [], []
    pairs: tuple[Pair, ...] = ()
    for axis, sizes in enumerate(factors):
        if axis:
            pairs = tuple(tuple(wave.next_axis() for wave in pair) for pair in pairs)
        for n in sizes:
            steps = [next_step(pair, n) for pair in pairs] if pairs else [first_step(n)]
            there, back = (torch.stack([getattr(s, way) for s in steps]) for way in ("forward", "backward"))
            forward.append(there if pairs else there[0])
            backward.append(back if pairs else back[0])
            pairs = tuple(pair for step in steps for pair in step.pairs)
    return forward, backward, pairs


def go(x: Tensor, matrices: tuple[Tensor, ...], sizes: list[int], inner: int) -> Tensor:
    """x (B, sizes..., inner) to its waves (B, pairs * 2, inner), or more axes with the same order."""
    rest = prod(sizes) * inner
    for matrix, n in zip(matrices, sizes, strict=True):
        rest //= n
        x = torch.matmul(matrix, x.reshape(-1, *matrix.shape[:-2], matrix.shape[-1], rest))
    return x


def go_back(waves: Tensor, matrices: tuple[Tensor, ...], sizes: list[int], inner: int) -> Tensor:
    """The inverse of `go`."""
    rest = inner
    for matrix, n in zip(reversed(matrices), reversed(sizes), strict=True):
        waves = torch.matmul(matrix, waves.reshape(-1, *matrix.shape[:-2], matrix.shape[-1], rest))
        rest *= n
    return waves


def _whole(kernel: Tensor) -> Tensor:
    """conj(fft(h)) of all frequencies: (G, *grid), complex."""
    return torch.fft.fftn(kernel, dim=tuple(range(1, kernel.ndim))).conj().resolve_conj()


def written(factors: Factors) -> str:
    """As in "14.14" or, on a grid, "14 x 7.2"."""
    return " x ".join(".".join(map(str, axis)) for axis in factors)


def prod_pairs(sizes: list[int]) -> int:
    """Pairs behind the steps."""
    return (sizes[0] + 1) // 2 * prod(sizes[1:])


def step_costs(problem: Problem, sizes: list[int], inner: int = 1) -> list[tuple[int, int, int]]:
    """Multiply-adds, numbers moved and numbers stored of each step, one way.

    Args:
        problem: for the batch and the channels.
        sizes: the factors.
        inner: places left untransformed behind the channels' axis.
    """
    costs = []
    rest = prod(sizes) * inner * problem.channels * problem.batch
    pairs = 1
    for index, n in enumerate(sizes):
        rest //= n
        rows = 2 * ((n + 1) // 2) if index == 0 else 2 * n
        columns = n if index == 0 else 2 * n
        stored = pairs * rows * columns
        costs.append((stored * rest, stored + pairs * (rows + columns) * rest, stored))
        pairs *= rows // 2
    return costs
