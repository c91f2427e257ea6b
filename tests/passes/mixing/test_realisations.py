"""Every realisation is the same map, in float64 to rounding, for grids of all kinds."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from tests.slow import rest_slow
from vmkd_fx.errors import ModelError
from vmkd_fx.models.global_filter import global_filter
from vmkd_fx.passes.circulant_mixer import circulant, circulant_by_matrices
from vmkd_fx.passes.mixing.choose import factorisations, named
from vmkd_fx.passes.mixing.convolution import CircularConvolution
from vmkd_fx.passes.mixing.dense import Dense
from vmkd_fx.passes.mixing.kernels import filter_kernel
from vmkd_fx.passes.mixing.matrix_fft import MatrixFFT, Partial
from vmkd_fx.passes.mixing.onnx_dft import OnnxDFT
from vmkd_fx.passes.mixing.problem import Problem, Realisation
from vmkd_fx.passes.mixing.real_fft import RealFFT
from vmkd_fx.passes.mixing.real_split import RealSplit


def everything(problem: Problem, most: int = 4) -> list[Realisation]:
    """All realisations that torch can compute, with every factorisation."""
    found: list[Realisation] = [kind(problem) for kind in (Dense, RealFFT, OnnxDFT, CircularConvolution)]
    splits = [RealSplit(problem, depth) for depth in (1, 2, 3)]
    found += [split for split in splits if split.fits("torch") is None]
    for factors in product(*(list(factorisations(size, most)) for size in problem.grid)):
        found.append(MatrixFFT(problem, factors))
        if sum(map(len, factors)) > 1:
            found.append(Partial(problem, factors))
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def problem_of(tokens: int, groups: int, channels: int) -> tuple[Problem, Tensor, Tensor]:
    torch.manual_seed(tokens)
    weight = torch.randn(groups, tokens, dtype=torch.float64)
    return (
        Problem((tokens,), channels, groups, 3),
        torch.randn(3, tokens, channels, dtype=torch.float64),
        weight,
    )


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 30, 36, 49])
@pytest.mark.parametrize(("groups", "channels"), [(1, 3), (2, 6), (6, 6)])
def test_one_dimension(tokens: int, groups: int, channels: int) -> None:
    problem, x, weight = problem_of(tokens, groups, channels)
    expected = circulant_by_matrices(x, weight)
    worst = {one.name: error(one(x, weight), expected) for one in everything(problem)}
    assert max(worst.values()) < 1e-12, worst


SIZES = rest_slow([196, 784])


@pytest.mark.parametrize("tokens", SIZES)
def test_the_sizes_of_real_models(tokens: int) -> None:
    problem, x, weight = problem_of(tokens, 2, 4)
    expected = circulant(x, weight)
    for one in everything(problem, most=2):
        assert error(one(x, weight), expected) < 1e-12, one.name


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (6, 1), (2, 2), (6, 6), (7, 5), (4, 7), (5, 8), (14, 14)])
def test_two_dimensions_also_where_the_spectrum_is_not_hermitian(grid: tuple[int, int]) -> None:
    torch.manual_seed(1)
    height, width = grid
    weight = torch.randn(height, width // 2 + 1, 4, 2, dtype=torch.float64)
    x = torch.randn(3, height, width, 4, dtype=torch.float64)
    expected, kernel = global_filter(x, weight), filter_kernel(weight, width)
    for one in everything(Problem(grid, 4, 4, 3)):
        assert error(one(x, kernel), expected) < 1e-12, one.name


def test_groups_on_a_grid() -> None:
    torch.manual_seed(2)
    kernel = torch.randn(2, 4, 6, dtype=torch.float64)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    problem = Problem((4, 6), 6, 2)
    expected = sum(kernel[:, i, j].repeat(3) * x.roll((-i, -j), (1, 2)) for i in range(4) for j in range(6))
    assert isinstance(expected, Tensor)
    for one in everything(problem):
        assert error(one(x, kernel), expected) < 1e-12, one.name


@pytest.mark.parametrize("tokens", SIZES)
def test_in_single_precision_with_constants_from_double(tokens: int) -> None:
    problem, x, weight = problem_of(tokens, 2, 4)
    expected = circulant(x, weight)
    for one in everything(problem, most=2):
        constants = [constant.float() for constant in one.prepare(weight)]
        found = one.apply(x.float(), *constants)
        assert found.dtype is torch.float32
        assert error(found.double(), expected) < 2e-6, one.name


def test_half_precision_goes_through_transforms_in_float32() -> None:
    problem, x, weight = problem_of(12, 2, 4)
    for one in (RealFFT(problem), OnnxDFT(problem)):
        found = one.apply(x.bfloat16(), *(constant.float() for constant in one.prepare(weight)))
        assert found.dtype is torch.bfloat16
        assert error(found.double(), circulant(x, weight)) < 2e-2


@pytest.mark.parametrize("name", ["matrix-fft 4.9", "partial-fft 4.9", "matrix-fft 2.3.6", "real-split 2"])
@pytest.mark.parametrize("damage", ["transposed", "sign", "one percent"])
def test_a_damaged_constant_is_seen(name: str, damage: str) -> None:
    """Each constant matters: there is none whose damage the comparison misses."""
    problem, x, weight = problem_of(36, 2, 4)
    expected = circulant(x, weight)
    one = named(problem, name)
    constants = one.prepare(weight)
    for index, constant in enumerate(constants):
        changed = list(constants)
        if damage == "transposed":
            if constant.shape[-1] != constant.shape[-2] or torch.equal(constant, constant.mT):
                continue
            changed[index] = constant.mT.contiguous()
        else:
            changed[index] = -constant if damage == "sign" else 1.01 * constant
        assert error(one.apply(x, *changed), expected) > 1e-4, (name, index)


def test_a_dropped_twiddle_is_seen() -> None:
    """Without the twiddle factors the map is a circulant over a grid, and no circulant."""
    problem, x, weight = problem_of(36, 2, 4)
    on_a_grid = MatrixFFT(Problem((4, 9), 4, 2), ((4,), (9,)))
    constants = MatrixFFT(problem, ((4, 9),)).prepare(weight)
    without = on_a_grid.prepare(weight.unflatten(1, (4, 9)))
    assert constants[1].shape == without[1].shape
    damaged = (constants[0], without[1], constants[2], without[3], *constants[4:])
    assert error(MatrixFFT(problem, ((4, 9),)).apply(x, *damaged), circulant(x, weight)) > 1e-2


def test_what_does_not_fit_says_why() -> None:
    problem = Problem((15,), 6, 2)
    assert "cannot be halved 1 times" in str(RealSplit(problem, 1).fits("torch"))
    assert RealSplit(Problem((12,), 6, 2), 2).fits("tensorrt-rtx") is None
    assert "no complex tensors" in str(RealFFT(problem).fits("onnxruntime"))
    dft = OnnxDFT(problem)
    assert dft.fits("onnxruntime") is None and dft.fits("tensorrt", (11, 2)) is None
    assert "since 11.2, and this one is 10.16" in str(dft.fits("tensorrt", (10, 16)))
    assert "unknown version" in str(dft.fits("tensorrt"))
    assert "no DFT" in str(dft.fits("tensorrt-rtx"))
    assert "4.7 GiB" in str(Dense(Problem((12544,), 96, 8)).fits("onnxruntime"))


def test_what_is_no_problem_is_refused() -> None:
    with pytest.raises(ModelError, match="4 groups do not divide 6 channels"):
        Problem((8,), 6, 4)
    with pytest.raises(ModelError, match=r"a grid is \(N,\) or \(H, W\)"):
        Problem((2, 2, 2), 4, 2)
    with pytest.raises(ModelError, match="do not multiply to the grid"):
        MatrixFFT(Problem((8,), 4, 2), ((2, 3),))
    with pytest.raises(ModelError, match="not two or more"):
        Partial(Problem((8,), 4, 2), ((8,),))
