"""Neighbourhoods as convolutions, and clamps: the same numbers from operators that engines have."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.passes.lowering import lowered_by, operators
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.graph.trace import trace
from vmkd_fx.passes.cleanup.clamps import CLAMPS
from vmkd_fx.passes.engine.unfold import UNFOLD
from vmkd_fx.passes.pipeline import lower

INF = float("inf")


class Neighbours(nn.Module):
    """Overlapping windows of a map (B, 6, 9, 7), a head that tells them apart, and back to a map."""

    def __init__(self, kernel: tuple[int, int], dilation: int, padding: int, stride: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, (3, 4), padding=(0, 1))
        self.window = {"kernel_size": kernel, "dilation": dilation, "padding": padding, "stride": stride}
        self.head = nn.Linear(6 * 9 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        windows = F.unfold(self.stem(x), **self.window)  # type: ignore[arg-type]
        order = torch.arange(windows.shape[1] * windows.shape[2]).reshape(windows.shape[1:])
        windows = torch.tanh(windows * torch.cos(order.to(x)))
        return self.head(F.fold(windows, (9, 7), **self.window).flatten(1))  # type: ignore[arg-type]


WINDOWS = [
    window for window in product([(3, 3), (2, 3)], (1, 2), (0, 1), (1, 2, 3)) if window != ((3, 3), 2, 0, 3)
]


@pytest.mark.parametrize("window", WINDOWS[::4], ids=str)
def test_windows_are_cut_out_and_added_up_by_convolutions(window: tuple) -> None:
    error, module, rewrite = lowered_by(Neighbours(*window), UNFOLD, size=(3, 27, 27))
    assert error <= 1e-15
    assert len(rewrite.sites) == 2
    found = operators(module)
    assert found["conv2d"] == 2 and found["conv_transpose2d"] == 1
    assert not found["im2col"] and not found["col2im"]


@pytest.mark.parametrize("window", [((5, 3), 1, 1, 1), ((3, 5), 1, 2, 2), ((4, 3), 2, 1, 1)], ids=str)
def test_large_windows_are_cut_along_rows_and_then_columns(window: tuple) -> None:
    error, module, _ = lowered_by(Neighbours(*window), UNFOLD, size=(3, 27, 27))
    assert error <= 1e-15
    assert operators(module)["conv2d"] == 3 and not operators(module)["im2col"]


def test_torch_keeps_its_own() -> None:
    _, module, rewrite = lowered_by(Neighbours((3, 3), 1, 1, 2), UNFOLD, size=(3, 27, 27), target="torch")
    assert operators(module)["im2col"] == operators(module)["col2im"] == 1 and not rewrite.sites


class SingleImage(nn.Module):
    """Channels pass for a batch: the map that is cut has the images as its channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.unfold(x.mean(1, keepdim=True).transpose(0, 1), 3).reshape(9, -1, 900).mean(0)


def test_a_window_across_images_stays() -> None:
    _, module, rewrite = lowered_by(SingleImage(), UNFOLD)
    assert operators(module)["im2col"] == 1 and not rewrite.sites
    assert [refusal.reason for refusal in rewrite.refusals.values()] == ["its operand is a single image"]


class Clipped(nn.Module):
    """Two linears that clip one input, by bounds that are buffers."""

    def __init__(self, *bounds: object) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 10), nn.Linear(8, 10)])
        self.kept = [None if bound is None else f"bound{place}" for place, bound in enumerate(bounds)]
        for name, bound in zip(self.kept, bounds, strict=True):
            if name is not None:
                self.register_buffer(name, torch.as_tensor(bound))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        low, high, *others = (None if name is None else getattr(self, name) for name in self.kept)
        return self.heads[0](x.clamp(low, high)) + self.heads[1](x.clamp(*(others or (low, high))))


PLACES = [[-0.1 * place for place in range(8)], [0.02 * place for place in range(8)]]


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        ((-0.1, 0.2, -0.3, 0.05), {"clamp": 2}),
        ((-INF, INF), {}),
        ((-INF, 0.1), {"clamp": 2}),
        ((None, 0.1), {"clamp": 2}),
        ((0.2, -0.1), {"clamp": 2}),
        ((*PLACES, -0.1, PLACES[1]), {"maximum": 1, "clamp_min": 1, "minimum": 2}),
    ],
    ids=str,
)
def test_clamps_get_numbers(bounds: tuple, left: dict[str, int]) -> None:
    error, module, rewrite = lowered_by(Clipped(*bounds), CLAMPS)
    assert error <= 1e-15 and len(rewrite.sites) == 2
    found = operators(module)
    names = ("clamp", "clamp_min", "clamp_max", "maximum", "minimum")
    assert {name: found[name] for name in names if found[name]} == left
    assert not any(
        isinstance(argument, torch.fx.Node)
        for node in module.graph.nodes
        if node.target is torch.ops.aten.clamp.default
        for argument in node.args[1:]
    )
    assert lowered_by(Clipped(*bounds), CLAMPS, CLAMPS)[2].sites == []


def test_bounds_that_leave_nothing_finite_stay() -> None:
    assert lowered_by(Clipped(INF, INF), CLAMPS)[2].sites == []


@pytest.mark.parametrize("bounds", [(-0.1, 0.2, -0.3, 0.05), (*PLACES, -0.1, 0.3)], ids=str)
def test_two_clamps_of_one_tensor_are_exported(bounds: tuple, tmp_path: Path) -> None:
    model = trace(Clipped(*bounds), input_size=(3, 32, 32))
    step = export(lower(model, "tensorrt-rtx"), tmp_path / "m.onnx")
    assert step.error is not None and step.error <= 1e-5


@pytest.mark.engine
def test_windows_become_an_engine(tmp_path: Path) -> None:
    from vmkd_fx.deploy.tensorrt import Network
    from vmkd_fx.target import Profile

    lowered = lower(trace(Neighbours((3, 3), 1, 1, 2), input_size=(3, 27, 27)), "tensorrt-rtx")
    export(lowered, tmp_path / "m.onnx")
    network = Network("tensorrt-rtx", tmp_path / "m.onnx")
    assert network.layers < 30
    assert network.build(Profile(1, 2, 4), (86, 89, 120), progress=False)
