"""The plan of a Fourier transform of real data as small real matrices (Cooley and Tukey, 1965).

A transform of length N = n m over z[m s + b], s < n, b < m, goes in two steps. With theta = (k + shift) / n:

    z_k[b] = sum over s of z[m s + b] exp(-2 pi i theta s)          n sequences of length m, one each k < n
    Z[k + n k'] = sum over b of z_k[b] exp(-2 pi i (k' + theta) b / m)

so what is left of z_k is a transform of length m whose frequencies are shifted by theta: the twiddle factor
is in the matrix of the next step. It starts at shift 0; a second axis of the grid starts at 0 again.

Real data. Sequences are kept in pairs, a row for re and a row for im. A complex sequence is a pair. A real
one with shift 0 or 1/2 is half of a pair: of its n results those with theta and 1 - theta are conjugates, so
that only 0 < theta < 1/2 is kept, with twice the weight on the way back, and theta = 0 and 1/2 stay real. Two
real sequences with n results each give n pairs, as one complex sequence does: nothing is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import pi

import torch
from torch import Tensor

HALF = Fraction(1, 2)


@dataclass(frozen=True)
class Wave:
    """What is left to transform of one sequence: its shift, and the frequencies of axes that are done."""

    shift: Fraction = Fraction(0)
    done: tuple[Fraction, ...] = ()

    def next_axis(self) -> Wave:
        """The wave at the start of the next axis."""
        return Wave(Fraction(0), (*self.done, self.shift))


Pair = tuple[Wave, ...]
"""One complex sequence, or two real ones in the rows of re and im."""


@dataclass(frozen=True)
class Step:
    """The step of one pair: n new pairs, and the matrices there and back.

    Attributes:
        pairs: the new ones.
        forward: (2n, 2n) or, from the one real sequence at the start, (2n', n): rows (pair, re or im),
            columns (re or im, s).
        backward: its inverse, (columns, rows).
    """

    pairs: tuple[Pair, ...]
    forward: Tensor
    backward: Tensor


def first_step(n: int) -> Step:
    """The first step, from one real sequence: (n + 1) // 2 pairs.

    For an odd n the sum stands alone: it goes on as a complex sequence whose im is zero.
    """
    thetas = [Fraction(k, n) for k in range(n // 2 + 1)]
    alone = [theta for theta in thetas if theta in (0, HALF)]
    rows, weights = [_cosines(theta, n) for theta in alone], [1.0] * len(alone)
    if len(alone) == 1:
        rows, weights = [*rows, torch.zeros(n, dtype=torch.float64)], [1.0, 0.0]
    pairs: list[Pair] = [tuple(Wave(theta) for theta in alone)]
    for theta in thetas:
        if theta not in alone:
            pairs.append((Wave(theta),))
            rows += [_cosines(theta, n), -_sines(theta, n)]
            weights += [2.0, 2.0]
    return _step(pairs, rows, weights, n)


def next_step(pair: Pair, n: int) -> Step:
    """A later step of one pair."""
    if len(pair) == 1:
        return _complex_step(pair[0], n)
    nothing = torch.zeros(n, dtype=torch.float64)
    alone: list[tuple[Wave, Tensor]] = []
    pairs: list[Pair] = []
    rows: list[Tensor] = []
    for half, wave in enumerate(pair):
        for k in range(n):
            theta = (k + wave.shift) / n
            parts = [_cosines(theta, n), -_sines(theta, n)]
            placed = [torch.cat([part, nothing] if half == 0 else [nothing, part]) for part in parts]
            if theta in (0, HALF):
                alone.append((Wave(theta, wave.done), placed[0]))
            elif theta < HALF:
                pairs.append((Wave(theta, wave.done),))
                rows += placed
    singles = [(alone[i], alone[i + 1]) for i in range(0, len(alone), 2)]
    front: list[Pair] = [(one[0], other[0]) for one, other in singles]
    real_rows = [row for single in singles for _, row in single]
    weights = [1.0] * len(real_rows) + [2.0] * len(rows)
    return _step([*front, *pairs], [*real_rows, *rows], weights, n)


def _complex_step(wave: Wave, n: int) -> Step:
    rows: list[Tensor] = []
    pairs: list[Pair] = []
    for k in range(n):
        theta = (k + wave.shift) / n
        cosines, sines = _cosines(theta, n), _sines(theta, n)
        rows += [torch.cat([cosines, sines]), torch.cat([-sines, cosines])]
        pairs.append((Wave(theta, wave.done),))
    return _step(pairs, rows, [1.0] * len(rows), n)


def _step(pairs: list[Pair], rows: list[Tensor], weights: list[float], n: int) -> Step:
    forward = torch.stack(rows)
    scale = torch.tensor(weights, dtype=torch.float64) / n
    return Step(tuple(pairs), forward, (forward * scale[:, None]).T.contiguous())


def _cosines(theta: Fraction, n: int) -> Tensor:
    return _angles(theta, n).cos()


def _sines(theta: Fraction, n: int) -> Tensor:
    return _angles(theta, n).sin()


def _angles(theta: Fraction, n: int) -> Tensor:
    """2 pi theta s for s < n, reduced to one turn before it is rounded."""
    turns = [float((theta * s) % 1) for s in range(n)]
    return 2 * pi * torch.tensor(turns, dtype=torch.float64)


def responses(pairs: tuple[Pair, ...], spectrum: Tensor) -> tuple[Tensor, Tensor]:
    """What a product of spectra does to pairs: y = direct * z + crossed * (z with re and im exchanged).

    Args:
        pairs: of a transform that is complete.
        spectrum: (G, *grid), complex, of all frequencies.

    Returns:
        direct and crossed, both (pairs, 2, G).
    """
    direct, crossed = [], []
    for pair in pairs:
        values = [_at(wave, spectrum) for wave in pair]
        if len(values) == 1:
            direct.append(torch.stack([values[0].real, values[0].real]))
            crossed.append(torch.stack([-values[0].imag, values[0].imag]))
        else:
            direct.append(torch.stack([value.real for value in values]))
            crossed.append(torch.zeros_like(direct[-1]))
    return torch.stack(direct), torch.stack(crossed)


def _at(wave: Wave, spectrum: Tensor) -> Tensor:
    """The values (G,) at a wave's frequency."""
    turns = (*wave.done, wave.shift)
    found = spectrum
    for turn, size in zip(turns, spectrum.shape[1:], strict=True):
        found = found[:, int(turn * size)]
    return found
