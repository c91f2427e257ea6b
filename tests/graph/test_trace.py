"""One graph, the same parameters, right in train() and in eval()."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from tests.checks import assert_same_module, fingerprint
from tests.models import FAMILIES, images, small
from vmkd_fx.errors import TraceError


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_is_the_model_in_both_modes(family: str) -> None:
    model = small(family)
    graph = vx.trace(model)
    x = images()

    for mode in (False, True, False):
        torch.manual_seed(1)
        expected = model.train(mode)(x)
        torch.manual_seed(1)
        assert torch.equal(graph.train(mode)(x), expected)


def test_training_mode_really_drops() -> None:
    model = small("deit", drop_path_rate=0.5)
    graph = vx.trace(model.eval()).train()
    x = images()
    assert not torch.equal(graph(x), graph(x))
    graph.eval()
    assert torch.equal(graph(x), graph(x))


def test_a_rate_that_depends_on_the_mode_is_read_at_run_time() -> None:
    graph = vx.trace(small("deit"))
    switches = [name for name, part in graph.named_modules() if type(part).__name__ == "ModeSwitch"]
    assert switches == ["blocks.0.attn.vmkd_mode_0", "blocks.1.attn.vmkd_mode_0"]
    assert not any(closed.path.endswith("attn") for closed in graph.closed), (
        "the block with qkv must stay open"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_models(family: str) -> None:
    model = small(family)
    graph = vx.trace(model).train()
    model.train()
    gradients = []
    for module in (model, graph):
        model.zero_grad()
        torch.manual_seed(2)
        module(images()).square().sum().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert one is two is None or torch.equal(one, two)


def test_the_given_model_is_left_alone() -> None:
    model = small("deit")
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    calls = []
    model.register_forward_hook(lambda *_: calls.append("root"))
    before = fingerprint(model)

    graph = vx.trace(model)
    graph.train()
    graph.eval()

    assert_same_module(model, before)


def test_a_cache_that_forward_fills_stays_the_models_own() -> None:
    model = timm.create_model("levit_128s", num_classes=10).eval()
    vx.trace(model)
    caches = [part.attention_bias_cache for part in model.modules() if hasattr(part, "attention_bias_cache")]
    assert caches and not any(caches)


def test_parameters_are_shared_unless_a_copy_is_asked_for() -> None:
    model = small("mixer")
    shared, private = vx.trace(model), vx.trace(model, copy=True)
    assert [id(p) for p in shared.parameters()] == [id(p) for p in model.parameters()]
    assert not {id(p) for p in private.parameters()} & {id(p) for p in model.parameters()}


def test_moving_the_graph_moves_the_models_buffers() -> None:
    model = timm.create_model("resnet10t", num_classes=10)
    vx.trace(model).double()
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64, torch.int64}


def test_running_statistics_are_shared() -> None:
    model = timm.create_model("resnet10t", num_classes=10)
    before = model.state_dict()["bn1.running_mean"].clone()
    vx.trace(model).train()(images())
    assert not torch.equal(model.bn1.running_mean, before)


class Unused(nn.Module):
    """Holds parameters that forward never reads, and makes up a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 3)
        self.never = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean((2, 3))) + torch.arange(10.0)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "trace again"])
def test_nothing_is_lost_on_the_way(way: str) -> None:
    model = Unused()
    graph = vx.trace(model, input_size=(3, 32, 32))
    twin = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda g: pickle.loads(pickle.dumps(g)),
        "trace again": vx.trace,
    }[way](graph)
    assert list(graph.state_dict()) == list(model.state_dict()) == list(twin.state_dict())
    assert twin.code == graph.code
    assert twin.info == graph.info
    assert torch.equal(twin(images()), model(images()))


def test_a_state_dict_goes_through_a_file() -> None:
    model = small("mixer")
    file = io.BytesIO()
    torch.save(vx.trace(model).state_dict(), file)
    file.seek(0)
    small("mixer", num_classes=10).load_state_dict(torch.load(file, weights_only=True), strict=True)


class Stubborn(nn.Module):
    """Looks at its values, which no trace can follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_module_that_cannot_be_traced_is_closed_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Stubborn(), nn.Flatten(), nn.LazyLinear(10))
    model(images())
    graph = vx.trace(model, input_size=(3, 32, 32))
    (closed,) = graph.closed
    assert closed.path == "1"
    assert "x.sum() > 0" in closed.reason
    assert torch.equal(graph(images()), model(images()))


def test_a_root_that_cannot_be_traced_says_where() -> None:
    with pytest.raises(TraceError, match=r"Stubborn cannot be traced.*test_trace\.py:\d+.*x\.sum\(\) > 0"):
        vx.trace(Stubborn())


class TwoFaced(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3)) if self.training else x.amax((1, 2, 3))


def test_a_root_with_two_faces_is_refused() -> None:
    with pytest.raises(TraceError, match="other steps in train"):
        vx.trace(TwoFaced())


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TraceError, match="got str"):
        vx.trace("resnet18")


@pytest.mark.parametrize("family", ["mixer", "deit"])
def test_one_graph_compiles_whole(family: str) -> None:
    graph = vx.trace(small(family)).eval()
    compiled = torch.compile(graph, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), graph(images()), rtol=1e-5, atol=1e-5)


class Counting(nn.Module):
    """Writes into a buffer in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.head = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return self.head(x.mean((2, 3))) * self.count


def test_a_buffer_that_forward_writes_is_written_by_the_graph_and_not_by_tracing() -> None:
    model = Counting()
    graph = vx.trace(model, input_size=(3, 32, 32))
    assert model.count == 0
    x = images()
    assert torch.equal(graph(x), Counting.forward(model, x) / 2)
    assert model.count == 2


class Detached(nn.Module):
    """Computes a part without gradients, which leaves no node in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.scale(x)


def test_a_part_without_gradients_stays_closed() -> None:
    model = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3), Detached(), nn.Linear(3, 10)
    )
    graph = vx.trace(model, input_size=(3, 32, 32))
    (closed,) = graph.closed
    assert closed.path == "3"
    assert "no_grad" in closed.reason
    graph(images()).sum().backward()
    assert model[3].scale.weight.grad is None
    assert model[2].weight.grad is None
    assert model[4].weight.grad is not None


class Forked(nn.Module):
    """The same operation on another operand, by mode."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.one(x), self.two(x)
        return torch.relu(one if self.training else two)


def test_a_module_wired_otherwise_by_mode_is_closed() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Forked(), nn.Linear(3, 10))
    graph = vx.trace(model, input_size=(3, 32, 32))
    assert [closed.path for closed in graph.closed] == ["2"]
    for mode in (True, False):
        assert torch.equal(graph.train(mode)(images()), model.train(mode)(images()))
