"""Realisations as ONNX with a dynamic batch, and as engines; graphs that keep their operators whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import vmkd_fx as vx
from tests.models import images, small
from tests.models_extra import test_gfnet as gfnets
from tests.slow import rest_slow
from vmkd_fx.deploy.engine import build
from vmkd_fx.deploy.onnx_operators import translations
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.models.global_filter import global_filter
from vmkd_fx.passes.circulant_mixer import CirculantConfig, CirculantMixer, circulant, inject_circulant_mixers
from vmkd_fx.passes.mixing.choose import candidates, named
from vmkd_fx.passes.mixing.measure import Alone, to_onnx
from vmkd_fx.passes.mixing.operators import keep_whole
from vmkd_fx.passes.mixing.problem import Problem

LINE = ["dense", "convolution", "onnx-dft", "real-split 2", "matrix-fft 3.4", "partial-fft 3.4"]
GRID = ["dense", "convolution", "onnx-dft", "real-split 1", "matrix-fft 4 x 5", "partial-fft 4 x 5"]


class Whole(nn.Module):
    """One of our operators alone."""

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(torch.ops.vmkd, self.name)(x, self.weight)


def assert_runs(module: nn.Module, x: Tensor, expected: Tensor, tolerance: float) -> onnx.ModelProto:
    """The file runs for another batch than it was exported with and gives `expected`."""
    data = to_onnx(module, x, translations())
    model = onnx.load_from_string(data)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert "Shape" not in {node.op_type for node in model.graph.node}
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=tolerance * expected.abs().max().item())
    return model


@pytest.mark.parametrize("name", rest_slow(LINE, 3))
def test_one_dimension_in_onnx_runtime(name: str) -> None:
    torch.manual_seed(0)
    kernel, x = torch.randn(2, 12, dtype=torch.float64), torch.randn(3, 12, 6)
    module = Alone(named(Problem((12,), 6, 2), name), kernel)
    assert_runs(module, x, circulant(x.double(), kernel).float(), 1e-5)


@pytest.mark.parametrize("name", rest_slow(GRID, 3))
def test_two_dimensions_in_onnx_runtime(name: str) -> None:
    torch.manual_seed(0)
    kernel, x = torch.randn(6, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, 6)
    one = named(Problem((4, 5), 6, 6), name)
    expected = named(one.problem, "real-fft")(x.double(), kernel).float()
    assert_runs(Alone(one, kernel), x, expected, 1e-5)


def test_a_matrix_transform_is_no_transpose_and_nothing_unusual() -> None:
    kernel, x = torch.randn(2, 12, dtype=torch.float64), torch.randn(2, 12, 6)
    module = Alone(named(Problem((12,), 6, 2), "matrix-fft 4.3"), kernel)
    model = assert_runs(module, x, circulant(x.double(), kernel).float(), 1e-5)
    used = {node.op_type for node in model.graph.node}
    assert used == {"Reshape", "MatMul", "Mul", "Slice", "Add"}


def test_operators_that_no_pass_lowered_are_written_as_dft() -> None:
    torch.manual_seed(0)
    for tokens in (9, 12):
        weight, x = torch.randn(2, tokens), torch.randn(3, tokens, 6)
        assert_runs(Whole("circulant", weight), x, circulant(x, weight), 1e-4)
    for grid in ((4, 5), (5, 6)):
        weight, x = torch.randn(grid[0], grid[1] // 2 + 1, 6, 2), torch.randn(3, *grid, 6)
        assert_runs(Whole("global_filter", weight), x, global_filter(x, weight), 1e-4)


@pytest.mark.parametrize("family", ["mixer", "resmlp", "gmlp"])
def test_circulant_mixers_stay_whole(family: str) -> None:
    student = inject_circulant_mixers(vx.trace(small(family)), CirculantConfig(groups=4)).eval()
    count = sum(isinstance(part, CirculantMixer) for part in student.modules())
    expected = student(images(3))
    keep_whole(student)
    assert_kept(student, torch.ops.vmkd.circulant.default, count)
    torch.testing.assert_close(student(images(3)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", gfnets.NAMES)
def test_global_filters_stay_whole(name: str) -> None:
    student = vx.trace(gfnets.small(name)).eval()
    count = sum(node.target is global_filter for node in student.graph.nodes)
    x = images(3, size=gfnets.SIZE)
    expected = student(x)
    keep_whole(student)
    assert_kept(student, torch.ops.vmkd.global_filter.default, count)
    torch.testing.assert_close(student(x), expected, rtol=0, atol=1e-5)


def assert_kept(student: TracedModule, operator: object, count: int) -> None:
    """`count` nodes of the operator, before and after torch.export with a dynamic batch."""
    assert count > 0
    assert not any(node.target is global_filter for node in student.graph.nodes)
    assert [node.target for node in student.graph.nodes].count(operator) == count
    size = gfnets.SIZE if operator is torch.ops.vmkd.global_filter.default else 32
    batch = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        program = torch.export.export(student, (images(2, size=size),), dynamic_shapes=batch)
    assert [node.target for node in program.graph.nodes].count(operator) == count
    assert not any("fft" in str(node.target) for node in program.graph.nodes)


@pytest.mark.engine
@pytest.mark.parametrize("problem", rest_slow([Problem((36,), 16, 4), Problem((6, 5), 8, 8)]))
def test_an_engine_takes_every_realisation_that_fits(problem: Problem, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    kernel = torch.randn(problem.groups, *problem.grid, dtype=torch.float64)
    x = torch.randn(2, *problem.grid, problem.channels)
    for one in candidates(problem, "tensorrt-rtx", each=1):
        path = tmp_path / "m.onnx"
        path.write_bytes(to_onnx(Alone(one, kernel), x, translations()))
        assert "layers of" in build(path, target="tensorrt-rtx:sm89", progress=False).detail, one.name
