"""Channel affines melt into the weights beside them, and what cannot melt is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from tests.models import FoldableNet, renamed, small
from tests.passes.lowering import operators
from tests.slow import rest_slow
from vmkd_fx.errors import VerificationError
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.verify import logits_of, probe_images, randomise_, relative_error
from vmkd_fx.passes.cleanup.constants import fold_constants
from vmkd_fx.passes.evaluation import specialise_to_evaluation, tidied
from vmkd_fx.passes.fold import absorb, channel_affine
from vmkd_fx.passes.fold.absorb import scale_columns, scale_rows
from vmkd_fx.passes.fold.channel_affine import fold_channel_affines
from vmkd_fx.passes.rewrite import Rewrite
from vmkd_fx.target import parse_target


def prepared(model: nn.Module) -> TracedModule:
    """A private float64 copy with random parameters, specialised to evaluation."""
    size = getattr(model, "input_size", None) or (3, 32, 32)
    module = randomise_(vx.trace(model, copy=True, input_size=size).double())
    return specialise_to_evaluation(module)[0]


def fold(module: TracedModule) -> tuple[TracedModule, Rewrite]:
    copy = fork(module, throwaway=True)
    fold_constants(Rewrite(copy, parse_target("onnxruntime")))
    rewrite = Rewrite(copy, parse_target("onnxruntime"))
    fold_channel_affines(rewrite)
    return tidied(copy), rewrite


def folded(model: nn.Module) -> tuple[float, TracedModule, Rewrite]:
    module = prepared(model)
    before = logits_of(module, probe_images(module))
    result, rewrite = fold(module)
    return relative_error(before, logits_of(result, probe_images(result))), result, rewrite


def affine_nodes(module: TracedModule) -> list[str]:
    return [n.name for n in module.graph.nodes if n.name.startswith(("mul", "addcmul", "sub", "batch_norm"))]


def test_everything_in_the_net_folds() -> None:
    error, module, record = folded(FoldableNet())
    assert len(record.sites) == 4, (
        "BatchNorm, RIFormer's affine, the scale behind LayerNorm, the Affine before the head"
    )
    assert not record.refusals
    assert not affine_nodes(module)
    assert 0 < error < 1e-12


def test_riformers_block_keeps_its_norm_and_loses_its_affine() -> None:
    """GN(x; g, b), s n + t - n  =  GN(x; g (s - 1), b (s - 1) + t)  (RIFormer Eq. 4)."""
    model = FoldableNet().double()
    weight, bias = model.block.norm1.weight.detach(), model.block.norm1.bias.detach()
    scale, shift = model.block.scale.detach(), model.block.shift.detach()
    nn.init.normal_(weight)
    nn.init.normal_(bias)
    module = specialise_to_evaluation(vx.trace(model, copy=True, input_size=(3, 32, 32)))[0]
    merged, _ = fold(module)
    norm = merged.get_submodule("block.norm1")
    torch.testing.assert_close(norm.weight, weight * (scale - 1), rtol=1e-14, atol=0)
    torch.testing.assert_close(norm.bias, bias * (scale - 1) + shift, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "matched"),
    rest_slow([("resnet10t", 14), ("convnext_atto", 12), ("deit3_small_patch16_224", 24)], 2),
)
def test_real_models(name: str, matched: int) -> None:
    model = timm.create_model(name, num_classes=10)
    model.input_size = (3, 224, 224) if "deit" in name else (3, 64, 64)
    error, _, record = folded(model)
    assert len(record.sites) == matched
    assert error < 1e-12


def test_resmlp_folds_before_and_behind() -> None:
    error, _, record = folded(small("resmlp"))
    assert sorted(site.what for site in record.sites) == [
        *["into the layer before"] * 2,
        *["into what is behind"] * 3,
    ], "two LayerScales and an Affine between two Linears; the Affines before a Linear over channels"
    assert error < 1e-12
    assert any("read by other nodes" in refusal.reason for refusal in record.refusals.values())


def test_it_is_idempotent() -> None:
    _, module, _ = folded(FoldableNet())
    code, state = module.code, {name: value.clone() for name, value in module.state_dict().items()}
    again, record = fold(module)
    assert len(record.sites) == 0
    assert again.code == code
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


class Twice(nn.Module):
    """One convolution called twice, a BatchNorm behind each call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.bn1(self.conv(x)))
        return self.head(torch.relu(self.bn2(self.conv(x))).mean((2, 3)))


class Tied(Twice):
    """Two convolutions that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.other.weight = self.conv.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.bn2(self.other(x))).mean((2, 3)))


class Tapped(Twice):
    """The convolution's result is read beside the BatchNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(torch.relu(self.stem(x)))
        return self.head((torch.relu(self.bn1(y)) + torch.relu(y)).mean((2, 3)))


class Padded(Twice):
    """A shift in front of zero padding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(self.bn1(torch.relu(self.stem(x))))).mean((2, 3)))


class WrongAxis(nn.Module):
    """A scale of the tokens, not of the channels, behind a Linear with as many of both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, 8)
        self.linear = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.rand(1, 16, 1) + 0.5)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.stem(x).flatten(2).transpose(1, 2)) * self.scale
        return self.head(torch.tanh(x).mean(1))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Twice, "the weights of conv2d_1 are used 2 times"),
        (Tied, "used 2 times"),
        (Tapped, "conv2d_1 before it is read by other nodes too"),
        (Padded, "conv2d_1 pads with zeros"),
        (WrongAxis, "channels of linear are on another axis"),
    ],
)
def test_traps_are_refused_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    error, _, record = folded(make())
    assert len(record.sites) == 0
    assert any(reason in refusal.reason for refusal in record.refusals.values())
    assert error == 0


def test_a_scale_may_cross_zero_padding() -> None:
    class Scaled(Padded):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.stem(x)) * self.bn1.weight.view(1, -1, 1, 1)
            return self.head(torch.relu(self.conv(x)).mean((2, 3)))

    error, _, record = folded(Scaled())
    assert [site.what for site in record.sites] == ["into what is behind"]
    assert error < 1e-12


class ScaledAndShifted(Twice):
    """A scale and a shift in front of zero padding, as the mean and std of images are."""

    def __init__(self, scale: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale)[:, None, None])
        self.register_buffer("mean", torch.randn(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (torch.tanh(self.stem(x)) - self.mean) * self.scale
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def test_a_scale_leaves_its_shift_before_zero_padding() -> None:
    error, module, record = folded(ScaledAndShifted((0.5, -2.0, 3.0, 1.0)))
    assert [site.what for site in record.sites] == ["scales into what is behind"]
    assert error < 1e-12
    assert operators(module)["add"] == 1 and not {"mul", "sub"} & set(operators(module))
    _, again = fold(module)
    assert not again.sites and any("pads with zeros" in r.reason for r in again.refusals.values())


def test_a_shift_behind_a_scale_of_zero_stays() -> None:
    prepared_ = prepared(ScaledAndShifted((0.5, 0.0, 3.0, 1.0)))
    prepared_.get_buffer("scale")[1] = 0  # random parameters have no zero
    module, record = fold(prepared_)
    assert not record.sites and operators(module)["mul"] == 1


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_columns_of_a_convolution_in_groups(groups: int) -> None:
    conv = nn.Conv2d(8, 12, 3, groups=groups, dtype=torch.float64)
    scale, shift = torch.rand(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    x = torch.randn(2, 8, 7, 7, dtype=torch.float64)
    expected = conv(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
    weight, bias = scale_columns(conv.weight, conv.bias, scale, shift, groups)
    torch.testing.assert_close(torch.conv2d(x, weight, bias, groups=groups), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 3, 3)])
def test_rows_without_a_bias(shape: tuple[int, ...]) -> None:
    weight, scale, shift = torch.randn(shape), torch.rand(6), torch.randn(6)
    new_weight, new_bias = scale_rows(weight, None, scale, shift)
    assert torch.equal(new_weight, weight * scale.view(-1, *[1] * (len(shape) - 1)))
    assert torch.equal(new_bias, shift)


CORRUPTIONS = {
    "dropped bias": lambda w, b: (w, torch.zeros_like(b)),
    "flipped sign": lambda w, b: (w, -b),
    "flipped scale": lambda w, b: (-w, b),
    "one percent": lambda w, b: (w * 1.01, b),
    "wrong axis": lambda w, b: (w.flip(0), b),
}


@pytest.mark.parametrize("rewrite", rest_slow(["scale_rows", "scale_columns"]))
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_verifier_catches_a_corrupted_rewrite(
    monkeypatch: pytest.MonkeyPatch, rewrite: str, corruption: str
) -> None:
    original, corrupt = getattr(absorb, rewrite), CORRUPTIONS[corruption]
    monkeypatch.setattr(absorb, rewrite, lambda *args: corrupt(*original(*args)))
    model = vx.trace(renamed(FoldableNet()), input_size=(3, 32, 32))
    with pytest.raises(VerificationError, match="pass channel_affine"):
        vx.lower(model, passes=["constants", "channel_affine"])


def test_the_verifier_catches_an_affine_that_is_only_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_affine, "absorb_behind", lambda rewrite, holder, pair: holder.node)
    with pytest.raises(VerificationError, match="pass channel_affine"):
        vx.lower(vx.trace(FoldableNet(), input_size=(3, 32, 32)))


def test_renamed_classes_fold_the_same() -> None:
    plain, other = folded(FoldableNet()), folded(renamed(FoldableNet()))
    assert len(plain[2].sites) == len(other[2].sites)


def test_the_source_is_left_alone() -> None:
    model = FoldableNet()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    vx.lower(vx.trace(model, input_size=(3, 32, 32)))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
