"""A graph on frames computes what the graph on normalised images computes, and melts what can melt."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import vmkd_fx as vx
from tests.models import small
from tests.passes.lowering import operators
from vmkd_fx.errors import ModelError, UnknownNameError, VerificationError
from vmkd_fx.frames import LAYOUTS, Frames
from vmkd_fx.graph.shapes import class_count, node_shapes
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import probe_images, randomise_, relative_error
from vmkd_fx.passes import frames as frames_step
from vmkd_fx.passes.fold import push
from vmkd_fx.passes.fold.absorb import absorb_before

EVEN = Frames("nhwc", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Patches(nn.Module):
    """A stem without padding, as patch embeddings are."""

    def __init__(self, channels: int = 3, kernel: int = 8, stride: int = 8, padding: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, kernel, stride, padding)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.stem(x)).mean((2, 3)))


class Padded(Patches):
    """A stem with zero padding, as ResNets have it."""

    def __init__(self) -> None:
        super().__init__(3, 3, 2, 1)


def traced(name: str) -> TracedModule:
    torch.manual_seed(0)
    model = small(name) if name == "deit" else Padded() if name == "padded" else Patches()
    return vx.trace(randomise_(model).double().eval(), input_size=(3, 32, 32))


@cache
def lowered_for(name: str, frames: str | None = None) -> TracedModule:
    """Shared by the tests, none of which changes it."""
    return vx.lower(traced(name), frames=frames)


def on_the_host(bytes_: torch.Tensor, frames: Frames) -> torch.Tensor:
    """As a loader normalises: scale to 0..1, channels first, mean, deviation."""
    images = bytes_.double() / 255
    images = images.permute(0, 3, 1, 2) if frames.layout == "nhwc" else images
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (frames.mean, frames.std))
    return (images - mean[:, None, None]) / std[:, None, None]


def random_bytes(module: TracedModule, batch: int = 3) -> torch.Tensor:
    assert module.info.frames is not None
    shape = module.info.frames.shape(module.info.need_input_size())
    return torch.randint(256, (batch, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@torch.no_grad()
def error_against(model: nn.Module, lowered: TracedModule) -> float:
    bytes_ = random_bytes(lowered)
    return relative_error(model(on_the_host(bytes_, lowered.info.frames)), lowered(bytes_))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["patches", "padded"])
def test_exact_against_the_host(name: str, layout: str) -> None:
    model, lowered = traced(name), lowered_for(name, f"uint8:{layout}")
    assert error_against(model, lowered) < 1e-12
    (step,) = (step for step in lowered.ledger.steps if step.name == "frames")
    assert step.error < 1e-12 and step.tolerance == 1e-12
    assert step.detail.startswith(f"uint8:{layout} with mean 0.485, 0.456, 0.406")
    assert model.info.frames is None


@pytest.mark.parametrize(
    ("name", "layout", "more"),
    [
        ("deit", "nhwc", {"_to_copy": 1, "permute": 1}),
        ("patches", "nchw", {"_to_copy": 1}),
        ("padded", "nhwc", {"_to_copy": 1, "permute": 1, "add": 1}),
        ("padded", "nchw", {"_to_copy": 1, "add": 1}),
    ],
)
def test_what_stays_in_the_graph(name: str, layout: str, more: dict[str, int]) -> None:
    """Of mean and std nothing where the stem has no padding, and one addition where it has."""
    plain, lowered = lowered_for(name), lowered_for(name, f"uint8:{layout}")
    assert dict(operators(lowered) - operators(plain)) == more
    assert not operators(plain) - operators(lowered)
    first = next(node for node in lowered.graph.nodes if node.op == "placeholder")
    assert [str(user.target) for user in first.users] == ["aten._to_copy.default"], "engines cast bytes first"


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels(channels: int) -> None:
    torch.manual_seed(0)
    model = randomise_(Patches(channels)).double().eval()
    lowered = vx.lower(vx.trace(model, input_size=(channels, 16, 16)), frames="uint8")
    assert lowered.info.frames.mean == (pytest.approx(0.449, abs=1e-3),) * channels
    assert error_against(model, lowered) < 1e-12


def test_a_mean_and_a_std_of_ones_own() -> None:
    model, own = traced("padded"), Frames("nchw", (0.1, 0.9, 0.4), (0.2, 0.6, 1.7))
    lowered = vx.lower(model, frames=own)
    assert lowered.info.frames == own
    assert error_against(model, lowered) < 1e-12
    with pytest.raises(ModelError, match=r"has 3 channels, and mean is \(0.5,\)"):
        vx.lower(model, frames=Frames("nhwc", (0.5,)))


def test_without_passes_it_is_written_out() -> None:
    model = traced("padded")
    lowered = vx.lower(model, passes=(), frames="uint8")
    found = [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"]
    assert found[:4] == [
        "aten._to_copy.default",
        "aten.permute.default",
        "aten.sub.Tensor",
        "aten.mul.Tensor",
    ]
    assert error_against(model, lowered) < 1e-12
    assert error_against(model, vx.lower(lowered)) < 1e-12


def test_the_precision_is_the_models() -> None:
    lowered = vx.lower(traced("padded").half(), frames="uint8")
    cast = next(node for node in lowered.graph.nodes if node.op == "call_function")
    assert cast.kwargs["dtype"] == torch.float16
    again = vx.lower(lowered)
    assert next(node for node in again.graph.nodes if node.op == "call_function").kwargs == cast.kwargs
    assert torch.isfinite(again(random_bytes(again))).all()


def test_what_is_lowered_can_be_lowered_again() -> None:
    once = vx.lower(traced("patches").float(), frames="uint8")
    twice = vx.lower(vx.lower(once), frames="uint8")
    assert twice.info.frames == once.info.frames
    assert operators(twice) == operators(once)
    bytes_ = random_bytes(once)
    assert relative_error(once(bytes_), twice(bytes_)) < 1e-5
    with pytest.raises(ModelError, match=r"takes frames uint8:nhwc .* already, and uint8:nchw .* asked for"):
        vx.lower(once, frames="uint8:nchw")
    with pytest.raises(ModelError, match="evaluate it before it is lowered"):
        vx.lower(once, evaluate=lambda module: 1.0)


def test_sizes_are_those_of_frames() -> None:
    plain, lowered = lowered_for("patches"), lowered_for("patches", "uint8:nhwc")
    images = probe_images(lowered, batch=4)
    assert images.dtype == torch.uint8 and images.shape == (4, 32, 32, 3)
    assert images.min() < 10 and images.max() > 245
    assert plain.ledger.steps[-1].multiply_adds == lowered.ledger.steps[-1].multiply_adds
    assert class_count(lowered, lowered.info.need_input_size()) == 10
    shapes = {node.op: shape for node, shape in node_shapes(lowered, batch=3).items()}
    assert shapes["placeholder"] == (3, 32, 32, 3)


def test_bad_spellings() -> None:
    with pytest.raises(UnknownNameError, match="there is no layout of frames 'nhw'"):
        vx.lower(Padded(), frames="uint8:nhw")


def test_a_wrong_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = frames_step._on_frames

    def wrong(module, frames, target):
        assert frames.mean is not None
        return right(module, replace(frames, mean=frames.mean[::-1]), target)

    monkeypatch.setattr(frames_step, "_on_frames", wrong)
    with pytest.raises(VerificationError, match=r"feeding .* uint8:nhwc"):
        vx.lower(traced("padded"), frames="uint8")


def test_equal_means_hide_no_wrong_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that takes one channel's scale for all is right for the model's numbers, and wrong."""
    model = traced("patches")

    def wrong(rewrite, holder, source, pair):
        scale, shift = (tensor.mean() if tensor.ndim else tensor for tensor in pair)
        return absorb_before(rewrite, holder, source, (scale, shift))

    monkeypatch.setattr(push, "absorb_before", wrong)
    with pytest.raises(VerificationError, match="pass channel_affine"):
        vx.lower(model, frames=EVEN)


def test_bisecting_graphs_on_frames() -> None:
    model = traced("padded")
    found = vx.bisect(model, frames="uint8")
    assert found.bad is None
    assert next(trial for trial in found.trials if trial.name == "channel_affine").sites == 1
    before, after = vx.lower(model, passes=(), frames="uint8"), lowered_for("padded", "uint8:nhwc")
    assert vx.bisect_graphs(before, after) is None
    with pytest.raises(ModelError, match="one graph takes uint8:nhwc and the other normalised images"):
        vx.bisect_graphs(before, lowered_for("padded"))
