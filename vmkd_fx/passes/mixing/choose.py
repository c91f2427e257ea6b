"""Which realisation a target gets: by a cost model, or by what was measured on the device.

    seconds = sum over what a `Cost` counts of count * rate        rates a target kind (`RATES`)

The rates for torch and ONNX Runtime were fitted to one core of a server CPU (AVX-512); what decides is their
proportions. Those of the engines are proportions of a GPU with 100 TFLOP/s and 1 TB/s and 2 us a layer, and
were not fitted to anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import isqrt

from vmkd_fx.errors import ModelError, UnknownNameError
from vmkd_fx.passes.mixing.convolution import CircularConvolution
from vmkd_fx.passes.mixing.dense import Dense
from vmkd_fx.passes.mixing.matrix_fft import Factors, MatrixFFT, Partial
from vmkd_fx.passes.mixing.onnx_dft import OnnxDFT
from vmkd_fx.passes.mixing.problem import Cost, Problem, Realisation
from vmkd_fx.passes.mixing.real_fft import RealFFT
from vmkd_fx.passes.mixing.real_split import RealSplit

_MOST_STEPS = 4
"""Factors an axis: more of them never paid where it was measured."""

_MOST_SPLITS = 3


@dataclass(frozen=True)
class Rates:
    """Picoseconds for each thing that a `Cost` counts; the names are its."""

    products: float
    taps: float
    transforms: float
    moved: float
    transposed: float
    operators: float

    def seconds(self, cost: Cost) -> float:
        """The model's time of a call."""
        return 1e-12 * sum(rate * getattr(cost, name) for name, rate in vars(self).items())


_ENGINE = Rates(products=0.02, taps=0.2, transforms=1.0, moved=4.0, transposed=8.0, operators=2e6)

RATES: Mapping[str, Rates] = {
    "torch": Rates(products=28, taps=400, transforms=200, moved=350, transposed=400, operators=1e7),
    "onnxruntime": Rates(products=28, taps=400, transforms=6e4, moved=200, transposed=400, operators=1e7),
    "tensorrt": _ENGINE,
    "tensorrt-rtx": _ENGINE,
}


@dataclass(frozen=True)
class Choice:
    """What was chosen and why; `as_data` is plain.

    Attributes:
        name: of the realisation.
        by: "model" or "measured".
        seconds: of each candidate, the fastest first.
        refused: of each realisation that does not fit, the reason.
    """

    name: str
    by: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def as_data(self) -> dict[str, object]:
        """For the ledger: strings and numbers in dicts."""
        return {
            "name": self.name,
            "by": self.by,
            "seconds": dict(self.seconds),
            "refused": dict(self.refused),
        }


def predicted(realisation: Realisation, kind: str) -> float:
    """The model's seconds on a target kind.

    Raises:
        UnknownNameError: there is no such kind.
    """
    if kind not in RATES:
        raise UnknownNameError("target", kind, RATES)
    return RATES[kind].seconds(realisation.cost())


def candidates(
    problem: Problem, kind: str, version: tuple[int, int] | None = None, each: int = 3
) -> tuple[Realisation, ...]:
    """The realisations that fit, the fastest by the model first.

    Args:
        problem: the map.
        kind: of the target.
        version: of its runtime, where it is known.
        each: how many factorisations are kept of each kind, the best by the model; 0 for all.
    """
    fitting: list[Realisation] = []
    for alike in _families(problem):
        fits = [one for one in alike if one.fits(kind, version) is None]
        fits.sort(key=lambda one: predicted(one, kind))
        fitting += fits[:each] if each else fits
    return tuple(sorted(fitting, key=lambda one: predicted(one, kind)))


def refusals(problem: Problem, kind: str, version: tuple[int, int] | None = None) -> dict[str, str]:
    """Why realisations do not fit, by name; of those with factors only the names that none of fits."""
    found = {}
    for alike in _families(problem):
        reasons = {one.name: one.fits(kind, version) for one in alike}
        if reasons and all(reasons.values()):
            name, reason = next(iter(reasons.items()))
            found[name] = str(reason)
    return found


def choose(
    problem: Problem,
    kind: str,
    version: tuple[int, int] | None = None,
    measured: Mapping[str, float] | None = None,
) -> tuple[Realisation, Choice]:
    """The realisation for a target, and the choice as data.

    Args:
        problem: the map.
        kind: of the target.
        version: of its runtime, where it is known.
        measured: seconds by name, from `measure`; without them the cost model decides.

    Raises:
        ModelError: none of what was measured fits.
        UnknownNameError: there is no such kind.
    """
    known = candidates(problem, kind, version, each=0 if measured else 3)
    by, seconds = "model", {one.name: predicted(one, kind) for one in known}
    if measured is not None:
        by, seconds = "measured", dict(sorted(measured.items(), key=lambda item: item[1]))
    name = next((name for name in seconds if any(one.name == name for one in known)), None)
    if name is None:
        raise ModelError(
            f"none of the measured {', '.join(seconds) or 'nothing'} fits {problem} on {kind}; "
            f"these do: {', '.join(one.name for one in known[:8])}"
        )
    chosen = next(one for one in known if one.name == name)
    return chosen, Choice(name, by, seconds, refusals(problem, kind, version))


def named(problem: Problem, name: str) -> Realisation:
    """The realisation that a ledger names.

    Raises:
        UnknownNameError: there is none of this name for this problem.
    """
    known = {one.name: one for alike in _families(problem) for one in alike}
    if name not in known:
        raise UnknownNameError("realisation", name, known, where=f"grid {problem.grid}")
    return known[name]


def _families(problem: Problem) -> Iterator[Sequence[Realisation]]:
    """All realisations of a problem, those of one kind together."""
    for kind in (Dense, RealFFT, OnnxDFT, CircularConvolution):
        yield [kind(problem)]
    yield [RealSplit(problem, depth) for depth in range(1, _MOST_SPLITS + 1)]
    yield [MatrixFFT(problem, factors) for factors in _factors(problem)]
    yield [Partial(problem, factors) for factors in _factors(problem) if sum(map(len, factors)) > 1]


def _factors(problem: Problem) -> Iterator[Factors]:
    most = _MOST_STEPS // len(problem.grid)
    return product(*(list(factorisations(size, most)) for size in problem.grid))


def factorisations(size: int, most: int) -> Iterator[tuple[int, ...]]:
    """All ordered tuples of at most `most` factors above 1 with the product `size`; (1,) for 1."""
    yield (size,)
    if most > 1:
        small = [first for first in range(2, isqrt(size) + 1) if size % first == 0]
        for first in sorted({*small, *(size // first for first in small)}):
            yield from ((first, *rest) for rest in factorisations(size // first, most - 1))
