"""Nets made to be lowered wrongly: each comes out right, whatever is folded or refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule
from torch.nn.utils.parametrizations import weight_norm

import vmkd_fx as vx
from tests.slow import rest_slow
from vmkd_fx.errors import VerificationError
from vmkd_fx.graph.verify import logits_of, randomise_, relative_error


class Net(nn.Module):
    """A stem of eight channels, a BatchNorm and a scale; subclasses say what is done with them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).flatten(2).mean(-1)


class ClampedInPlace(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        h.clamp_(-0.1, 0.1)
        return self.last(h)


class ChangedBehindTheAffine(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        y = h * self.gain
        h.mul_(2)
        return self.last(y) + h


class ChangedThroughAView(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        y = h * self.gain
        h.view(-1).mul_(2)
        return y + h


class ReluBeforeTheNorm(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        F.relu(h, inplace=True)
        return self.last(self.bn(h))


class ClampingBatchNorm(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-0.1, 0.1)


class SubclassedNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = ClampingBatchNorm(8)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.bn(self.conv(x)))


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(_clamp)
        self.identity = nn.Identity()
        self.identity.register_forward_hook(_clamp)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.identity(self.bn(self.conv(x))))


def _clamp(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output.clamp(-0.1, 0.1)


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own, as weight-standardised ones have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class OwnConvolution(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardised(3, 8, 3)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.bn(self.conv(x)))


class Parametrised(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm(self.conv)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.bn(self.conv(x)))


class ComputedWeight(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        h = F.conv2d(x, self.conv.weight * 0.5, self.conv.bias * 2)
        return self.last(self.bn(h)) * self.gain


class ComputedStatistics(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        bn = self.bn
        return F.batch_norm(
            self.conv(x), bn.running_mean, bn.running_var, bn.weight * self.gain[:, 0, 0], bn.bias + 1
        )


class NormWithoutWeightsTwice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 8, affine=False)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        return self.norm(h) * self.gain + self.norm(torch.relu(h)) * 3


class NormOverTwoAxes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8, 6))
        self.rows = nn.Parameter(torch.rand(6))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x).mean(-1)
        return (F.layer_norm(h, (8, 6), self.weight, self.weight) * self.rows).unsqueeze(-1)


class NormOfTheShapeItFinds(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x).transpose(1, 3)
        return (F.layer_norm(h, h.shape[-1:]) * self.gain.flatten()).transpose(1, 3)


class BatchNormByKeyword(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.bn(input=self.conv(x)))


class BufferWrittenInForward(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.ones(8, 1, 1))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        self.level.copy_(h.abs().mean((0, 2, 3)).view(8, 1, 1))
        return self.last(h * self.level)


class PlainTensor(Net):
    """Held by no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.rand(8, 1, 1, dtype=torch.float64)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.conv(x)) * self.level)


class LeftConstants(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        return 1 - self.conv(x) + 2 / (3 + self.last(self.bn(self.conv(x))) ** 2)


TRAPS = [net for net in Net.__subclasses__()]


@pytest.mark.parametrize("make", TRAPS, ids=lambda make: make.__name__)
def test_the_lowered_net_computes_the_same(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomise_(make().double().eval())
    x = 3 * torch.randn(5, 3, 8, 8, dtype=torch.float64)
    expected = logits_of(model, x)
    lowered = vx.lower(vx.trace(model, input_size=(3, 8, 8)))
    assert relative_error(expected, logits_of(lowered, x)) < 1e-12


@pytest.mark.parametrize("name", rest_slow(["test_efficientnet", "test_byobnet", "resnetv2_18"]))
def test_norms_with_an_activation_inside(name: str) -> None:
    model = randomise_(timm.create_model(name, num_classes=10)).double().eval()
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    lowered = vx.lower(vx.trace(model, input_size=(3, 96, 96)))
    assert relative_error(logits_of(model, x), logits_of(lowered, x)) < 1e-12


def test_complex_parameters_stay_complex() -> None:
    class Filter(Net):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.randn(8, 6, 4, dtype=torch.complex64))

        def body(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.irfft2(torch.fft.rfft2(self.conv(x)) * self.filter, s=(6, 6))

    model = Filter().eval()
    x = torch.randn(2, 3, 8, 8)
    lowered = vx.lower(vx.trace(model, input_size=(3, 8, 8)))
    assert lowered.filter.dtype == torch.complex64
    torch.testing.assert_close(lowered(x), model(x))


def test_a_mask_of_infinities_is_no_overflow() -> None:
    class Masked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, float("-inf")]).repeat(4).view(8, 1, 1))

        def body(self, x: torch.Tensor) -> torch.Tensor:
            return torch.exp(self.bn(self.conv(x)) + self.mask)

    model = Masked().eval()
    x = torch.randn(2, 3, 8, 8)
    lowered = vx.lower(vx.trace(model, input_size=(3, 8, 8)))
    torch.testing.assert_close(lowered(x), model(x))


def test_what_does_not_fit_into_half_is_refused() -> None:
    class Steep(Net):
        def body(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.conv(x))

    model = Steep().eval()
    with torch.no_grad():
        model.conv.weight.fill_(1)
        model.bn.weight.fill_(250)
        model.bn.running_var.fill_(1e-7)
    with pytest.raises(VerificationError, match=r"does not fit into torch\.float16"):
        vx.lower(vx.trace(model.half(), input_size=(3, 8, 8)))


class Careful(nn.Module):
    """Attention that leaves autocast and computes in single precision, as EfficientViT's does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            weights = torch.softmax(x.float().flatten(2), -1)
            x = (weights * x.float().flatten(2)).sum(-1).to(dtype)
        return self.head(x)


def test_a_block_without_autocast_is_part_of_the_graph() -> None:
    model = Careful().eval()
    x = torch.randn(3, 3, 16, 16)
    lowered = vx.lower(vx.trace(deepcopy(model), input_size=(3, 16, 16)))
    assert not any(isinstance(part, GraphModule) for part in list(lowered.modules())[1:])
    torch.testing.assert_close(lowered(x), model(x))
    assert pickle.loads(pickle.dumps(lowered))(x).equal(lowered(x))
