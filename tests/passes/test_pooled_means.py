"""A pooling to one place is an average, and the exported graph asks for no shape because of it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from tests.passes.lowering import lowered_by, operators
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.passes.cleanup.means import MEANS

SIZE = (3, 16, 16)


class Pooled(nn.Module):
    """ConvNeXt's head: channels-last maps, summed, pooled and normalised."""

    def __init__(self, places: int = 1) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
        self.pool = nn.AdaptiveAvgPool2d(places)
        self.norm, self.head = nn.LayerNorm(8 * places**2), nn.Linear(8 * places**2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x
        return self.head(self.norm(self.pool(x).flatten(1)))


def test_a_pooling_to_one_place_is_an_average(tmp_path: Path) -> None:
    error, module, record = lowered_by(Pooled(), MEANS, target="tensorrt-rtx", size=SIZE)
    assert error < 1e-12
    assert len(record.sites) == 1
    assert operators(module)["mean"] == 1 and not operators(module)["adaptive_avg_pool2d"]
    export(module.float(), tmp_path / "m.onnx", input_size=SIZE)
    asked = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert not asked & {"Shape", "Range", "Gather"}


@pytest.mark.parametrize(("places", "target"), [(2, "tensorrt-rtx"), (1, "torch")])
def test_other_poolings_stay(places: int, target: str) -> None:
    error, module, record = lowered_by(Pooled(places), MEANS, target=target, size=SIZE)
    assert error < 1e-12
    assert not record.sites and operators(module)["adaptive_avg_pool2d"] == 1


class AveragedInFloat(nn.Module):
    """An average that is taken in float32 whatever the model's own precision is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.stem(x).permute(0, 2, 3, 1).mean((1, 2), dtype=torch.float32)
        return self.head(mean.to(self.head.weight.dtype))


def test_an_average_in_another_precision_stays() -> None:
    _, module, record = lowered_by(AveragedInFloat(), MEANS, size=SIZE)
    assert [refusal.reason for refusal in record.refusals.values()] == ["it casts as well"]
    assert operators(module)["permute"] == 1
