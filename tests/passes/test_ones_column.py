"""The normaliser of a linear attention as a sum of keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import vmkd_fx as vx
from tests.passes.lowering import lowered_by, operators
from vmkd_fx.graph.verify import relative_error
from vmkd_fx.passes.cleanup.views import VIEWS
from vmkd_fx.passes.engine.ones_column import ONES_COLUMN
from vmkd_fx.passes.rewrite import is_call


class LinearAttention(nn.Module):
    """16 tokens of 8 channels; as EfficientViT writes it, with a column of ones beside the values."""

    column = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 24, 8, 8), nn.Linear(8, 10)

    def cast(self, x: Tensor) -> Tensor:
        return x

    def cut(self, both: Tensor) -> Tensor:
        return both[..., :-1] / both[..., -1:]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.stem(x).flatten(2).transpose(1, 2).chunk(3, -1)
        values = functional.pad(v, (0, 1), value=self.column)
        q, k, values = map(self.cast, (torch.sigmoid(q), torch.sigmoid(k), values))
        both = q @ (k.transpose(1, 2) @ values)
        return self.head(torch.tanh(self.cut(both)).mean(1))


class InSingle(LinearAttention):
    """Multiplied in float32 whatever it is in, as EfficientViT does."""

    def cast(self, x: Tensor) -> Tensor:
        return x.float()

    def cut(self, both: Tensor) -> Tensor:
        return super().cut(both).to(self.head.weight.dtype)


class Zeros(LinearAttention):
    column = 0.0

    def cut(self, both: Tensor) -> Tensor:
        return both[..., :-1] + both[..., -1:]


class WholeRead(LinearAttention):
    def cut(self, both: Tensor) -> Tensor:
        return both[..., :-1] / both.sum(-1, keepdim=True)


class CutElsewhere(LinearAttention):
    def cut(self, both: Tensor) -> Tensor:
        return both[..., 1:] / both[..., :1].exp()


class Selected(LinearAttention):
    def cut(self, both: Tensor) -> Tensor:
        return both[..., :-1] / both.select(2, 8).unsqueeze(2)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_the_column_is_a_sum(target: str) -> None:
    error, module, record = lowered_by(LinearAttention(), VIEWS, ONES_COLUMN, target=target)
    assert error < 1e-14
    assert len(record.sites) == 1
    found = operators(module)
    assert (found["matmul"], found["sum"]) == (3, 1)
    assert not {"pad", "slice"} & set(found)
    assert not lowered_by(LinearAttention(), VIEWS, ONES_COLUMN, ONES_COLUMN, target=target)[2].sites


def test_a_model_in_half_keeps_its_casts() -> None:
    model = InSingle().half().eval()
    lowered = vx.lower(vx.trace(model, input_size=(3, 32, 32)), "tensorrt-rtx")
    assert next(step.matched for step in vx.ledger(lowered).steps if step.name == "ones_column") == 1
    products = [node for node in lowered.graph.nodes if is_call(node, torch.ops.aten.matmul)]
    dtypes = {node.args[1].args[1] for node in products if is_call(node.args[1], torch.ops.aten.to)}
    assert dtypes == {torch.float32}
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).half()
    assert relative_error(model(images), lowered(images)) < 1e-2


@pytest.mark.parametrize(("make", "said"), [(Zeros, 0), (WholeRead, 1), (CutElsewhere, 1), (Selected, 1)])
def test_what_is_no_such_column_stays(make: type[LinearAttention], said: int) -> None:
    error, module, record = lowered_by(make(), VIEWS, ONES_COLUMN, target="tensorrt-rtx")
    assert error == 0
    assert operators(module)["pad"] == 1 and not record.sites
    assert len(record.refusals) == said


@pytest.mark.parametrize("target", ["torch", "onnxruntime"])
def test_other_targets_keep_it(target: str) -> None:
    _, module, record = lowered_by(LinearAttention(), VIEWS, ONES_COLUMN, target=target)
    assert not record.sites and operators(module)["pad"] == 1
