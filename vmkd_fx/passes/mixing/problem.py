"""What all realisations share: the map they compute, what they cost, and the face they show.

    y[b, i, c] = sum over k of h[c mod G, k] x[b, (i + k) mod N, c]         i, k indices of the grid, N its
                                                                            size, in one dimension or two

A circulant mixer is this map with h its weight; a global filter is it in two dimensions with G = C
(`kernels`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from vmkd_fx.errors import ModelError

LARGEST_CONSTANT = 2**30
"""Bytes in float32 that a realisation may add to a model; an ONNX file holds no more than 2 GiB."""


@dataclass(frozen=True)
class Problem:
    """The shape of one circulant map.

    Attributes:
        grid: (N,) tokens, or (H, W).
        channels: C.
        groups: G, a divisor of C; channel c uses kernel c mod G.
        batch: the batch that costs are for.

    Raises:
        ModelError: the grid has no or more than two axes, or G does not divide C.
    """

    grid: tuple[int, ...]
    channels: int
    groups: int
    batch: int = 1

    def __post_init__(self) -> None:
        if len(self.grid) not in (1, 2) or min(self.grid) < 1:
            raise ModelError(f"a grid is (N,) or (H, W) of positive sizes, got {self.grid}")
        if self.groups < 1 or self.channels % self.groups:
            raise ModelError(f"{self.groups} groups do not divide {self.channels} channels evenly")

    @property
    def tokens(self) -> int:
        """Places of the grid."""
        return prod(self.grid)

    @property
    def members(self) -> int:
        """Channels a group."""
        return self.channels // self.groups

    @property
    def elements(self) -> int:
        """Numbers in x."""
        return self.batch * self.tokens * self.channels


@dataclass(frozen=True)
class Cost:
    """What one call takes, for the batch of the problem.

    Attributes:
        products: multiply-adds in matrix products.
        taps: multiply-adds in convolutions.
        transforms: sum over Fourier transforms of elements times log2 of the length.
        moved: numbers read and written by all operators, constants included.
        transposed: numbers that go through a transpose, counted once each time.
        constants: numbers that the model stores.
        operators: calls of a kernel.
    """

    products: int = 0
    taps: int = 0
    transforms: float = 0.0
    moved: int = 0
    transposed: int = 0
    constants: int = 0
    operators: int = 0


@dataclass(frozen=True)
class Realisation(ABC):
    """One way to compute the map of `problem`."""

    problem: Problem

    @property
    @abstractmethod
    def name(self) -> str:
        """For the ledger; unique among the realisations of one problem."""

    @abstractmethod
    def prepare(self, kernel: Tensor) -> tuple[Tensor, ...]:
        """The constants for h (G, *grid), in the dtype of h: give float64 and cast the result."""

    @abstractmethod
    def apply(self, x: Tensor, *constants: Tensor) -> Tensor:
        """Map x (B, *grid, C) to the same shape. Plain torch code, for any batch."""

    @abstractmethod
    def cost(self) -> Cost:
        """What a call takes."""

    def fits(self, kind: str, version: tuple[int, int] | None = None) -> str | None:
        """Why it cannot run on a target kind, or None. `version` is the runtime's, where it is known."""
        size = 4 * self.cost().constants
        if size > LARGEST_CONSTANT:
            return f"its constants take {size / 2**30:.1f} GiB in float32"
        return None

    def __call__(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Prepare and apply in one, in the precision of the kernel."""
        return self.apply(x, *self.prepare(kernel))


def grouped(x: Tensor, problem: Problem) -> Tensor:
    """x (B, ..., C), C = (members, G), as (G, B, ..., members). One axis moves: runtimes do that fast."""
    split = x.reshape(-1, *x.shape[1:-1], problem.members, problem.groups)
    return split.permute(split.ndim - 1, *range(split.ndim - 1))


def ungrouped(x: Tensor, problem: Problem) -> Tensor:
    """The inverse of `grouped`: (G, B, ..., members) to (B, ..., C)."""
    inner = x.shape[2:-1]
    return x.permute(*range(1, x.ndim), 0).reshape(-1, *inner, problem.channels)


def to_channels(values: Tensor, problem: Problem) -> Tensor:
    """Values (G, ...) as (..., C): each group's value at its channels."""
    return torch.movedim(values.repeat((problem.members,) + (1,) * (values.ndim - 1)), 0, -1).contiguous()
