"""What made tracing go wrong, each as the smallest module that shows it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vmkd_fx as vx
from tests.checks import assert_computes_the_same, assert_same_module, fingerprint, identical
from tests.models import images, small
from vmkd_fx.errors import TraceError
from vmkd_fx.graph.edit import owner
from vmkd_fx.passes.evaluation import specialise_to_evaluation

SIZE = (3, 32, 32)


class Net(nn.Module):
    """A convolution, a trap and a head; the trap is a part of the net, or the net's own forward."""

    def __init__(self, trap: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.trap = trap
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trap(self.stem(x)).mean((2, 3)))


def net(trap: nn.Module) -> Net:
    torch.manual_seed(0)
    return Net(trap)


def assert_traced_right(model: nn.Module, *sizes: int) -> vx.graph.traced.TracedModule:
    """Open, equal to the model over three passes and after pickling, and the model left as it was."""
    twin = copy.deepcopy(model)
    before = fingerprint(twin)
    graph = vx.trace(twin, input_size=SIZE)
    assert_same_module(twin, before)
    assert not graph.closed
    for size in sizes or (32,):
        assert_computes_the_same(graph, model, images(size=size))
        assert_computes_the_same(graph, model, images(3, size=size))
    restored = pickle.loads(pickle.dumps(graph))
    assert identical(restored.eval()(images()), model.eval()(images()))
    return graph


class AddsOntoAnAlias(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        same = h
        h += 1
        return h * same


class AddsOntoWhatAnIdentityReturned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(x)
        h += 1
        return x * h


class AddsOntoAView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        first = x[:, 0]
        first += 1
        first *= 2
        first -= 0.5
        first /= 3
        return x


class MasksWithAugmentedAnd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mask = x > 0
        same = mask
        mask &= x < 1
        mask |= x > 2
        return x * same


class WritesItems(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        h[:, 0] = 0
        h[:, 1:3, ..., 0] = x[:, :2, ..., 0] * 2
        h[h < 0] *= 0.5
        return h


class WritesIntoATensorOfTheImages(nn.Module):
    """What is made anew in each forward holds nothing of the forward before."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(4)
        total += x.mean((0, 2, 3))
        part = torch.zeros(x.shape[0], 2, 2)
        part[:, 0] = x.mean()
        row = part[:, 1]
        row += x.amax()
        return x + total.view(1, -1, 1, 1) + part.sum()


class CountsInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        count = self.count
        count += 1
        self.count += 1
        self.count[0] += 1
        return x * self.count.sum()


class MakesTensorsByTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x + torch.zeros(batch, 1, 1, 1) + torch.arange(channels).view(-1, 1, 1)
        x = x + torch.full((batch, channels, 1, 1), 0.5) + torch.linspace(0, 1, width)
        return x * torch.ones(height, width, device=x.device, dtype=x.dtype).tril()


class DrawsNoise(nn.Module):
    """Of a size that is a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(4, 1, 1) if self.training else x + torch.rand(4, 1, 1) * 0


class Mixes(nn.Module):
    """Always as many operations, whatever the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(4, 1, 1) * torch.randint(0, 3, (4, 1, 1)) * (0.1 if self.training else 0.0)


class UnpacksInEveryWay(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        one, two, three, four = x.unbind(1)
        first, *others = x.chunk(2, dim=1)
        together = torch.cat([first, *others], dim=1)
        total = sum(part for part in x.split(2, dim=1))
        rows, rest = divmod(x.shape[2], 3)
        assert len(x.shape) == 4
        stacked = torch.stack([one, two, three, four], dim=1)
        return stacked + together + torch.cat((total, total), dim=1) + rows + rest


class IteratesOverATensor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        channels = x.transpose(0, 1)
        return torch.stack([channel * i for i, channel in enumerate(channels)], 1) + len(channels)


class Autocasts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.mix(x)
            with torch.autocast(device_type=x.device.type, enabled=False):
                x = self.mix(x.float())
        return x + self.low(x)

    @torch.autocast("cpu", torch.bfloat16)
    def low(self, x: Tensor) -> Tensor:
        return self.mix(x).float()


class ReplacesABufferByShape(nn.Module):
    """A table that is made again where the images have another size."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape != x.shape[2:]:
            self.table = torch.arange(x.shape[2] * x.shape[3]).view(x.shape[2], x.shape[3]) / 10
        return x + self.table


class CachesInANestedDictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._cache: dict[str, dict[int, Tensor]] = {"tables": {}}

    def forward(self, x: Tensor) -> Tensor:
        tables = self._cache["tables"]
        if x.shape[1] not in tables:
            tables[4] = torch.arange(4.0).view(-1, 1, 1) * x.shape[2]
        return x + tables[4]


class CallsAPartTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.1))
        self.two = self.one
        self.parts = [self.one, self.two]
        self.call = self.one.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) + self.parts[0](x) + self.call(x)


class MakesManyConstants(nn.Module):
    """Each is gone before the next is made, which may then take its identity."""

    def forward(self, x: Tensor) -> Tensor:
        for i in range(50):
            x = x + torch.full((4, 1, 1), float(i))
        return x


OPEN = (
    AddsOntoAnAlias,
    AddsOntoWhatAnIdentityReturned,
    AddsOntoAView,
    MasksWithAugmentedAnd,
    WritesItems,
    WritesIntoATensorOfTheImages,
    CountsInABuffer,
    MakesTensorsByTheBatch,
    Mixes,
    UnpacksInEveryWay,
    IteratesOverATensor,
    Autocasts,
    ReplacesABufferByShape,
    CachesInANestedDictionary,
    CallsAPartTwice,
    MakesManyConstants,
)


@pytest.mark.parametrize("trap", OPEN)
@pytest.mark.parametrize("place", ["submodule", "root"])
def test_a_trap_stays_open_and_is_right(trap: type[nn.Module], place: str) -> None:
    if place == "submodule":
        assert_traced_right(net(trap()))
        return
    torch.manual_seed(0)

    class Rooted(trap):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 4, stride=4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.stem(x)).flatten(1)

    globals()["Rooted"] = Rooted  # where pickle looks for it
    Rooted.__qualname__ = "Rooted"
    assert_traced_right(Rooted())


def test_other_operations_by_mode_close_the_part_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), DrawsNoise(), MakesManyConstants(), Mixes())
    graph = vx.trace(copy.deepcopy(model), input_size=SIZE)
    assert [closed.path for closed in graph.closed] == ["1"]
    assert_computes_the_same(graph, model, images())


class DrawsWithoutTorchSeeing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.bernoulli(torch.full((4, 1, 1), 0.5)) + F.dropout(torch.ones(4, 1, 1), 0.5)


def test_random_numbers_that_would_be_frozen_close_the_part() -> None:
    model = net(DrawsWithoutTorchSeeing())
    state = torch.get_rng_state()
    graph = vx.trace(copy.deepcopy(model), input_size=SIZE)
    assert torch.equal(torch.get_rng_state(), state)
    (closed,) = graph.closed
    assert closed.path == "trap"
    assert "random numbers" in closed.reason
    assert_computes_the_same(graph, model, images())
    with pytest.raises(TraceError, match="random numbers"):
        vx.trace(DrawsWithoutTorchSeeing(), input_size=SIZE)


@pytest.mark.parametrize("trap", [Autocasts, MakesManyConstants, DrawsNoise, MakesTensorsByTheBatch])
def test_a_graph_is_traced_again_for_evaluation_alone(trap: type[nn.Module]) -> None:
    model = net(nn.Sequential(MakesManyConstants(), trap())).eval()
    graph, _ = specialise_to_evaluation(vx.trace(copy.deepcopy(model), input_size=SIZE))
    assert identical(graph(images()), model(images()))
    assert not torch.is_autocast_enabled("cpu")


# Decisions


class DecidesByData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return x * 2
        return x


class DecidesByNumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return x * 2
        return x


class LoopsOverTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([image * 2 for image in x])


class HalvesTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0] // 2):
            x = x * 2
        return x


@pytest.mark.parametrize(
    ("trap", "reason", "line"),
    [
        (DecidesByData, "decides by the data", "if x.mean() > 0:"),
        (DecidesByNumber, "decides by the number of images", "if x.shape[0] > 1:"),
        (LoopsOverTheBatch, "decides by the number of images", "for image in x"),
        (HalvesTheBatch, "decides by the number of images", "for _ in range(x.shape[0] // 2)"),
    ],
)
def test_a_decision_that_no_graph_can_take_is_named_with_its_line(
    trap: type[nn.Module], reason: str, line: str
) -> None:
    model = net(trap())
    graph = vx.trace(copy.deepcopy(model), input_size=SIZE)
    (closed,) = graph.closed
    assert closed.path == "trap"
    assert reason in closed.reason
    assert "test_tracer_traps.py" in closed.reason
    assert line in closed.reason
    for count in (1, 2, 4):
        assert identical(graph.eval()(images(count)), model.eval()(images(count)))

    with pytest.raises(TraceError) as refusal:
        vx.trace(trap(), input_size=SIZE)
    assert trap.__name__ in str(refusal.value)
    assert reason in str(refusal.value)
    assert line in str(refusal.value)


class DecidesBySize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 7:
            x = F.pad(x, (0, 7 - x.shape[-1] % 7))
        return x


class DecidesByChannels(nn.Module):
    """Which are the same whatever the images' size."""

    def forward(self, x: Tensor) -> Tensor:
        _, channels, _, _ = x.shape
        if channels == 4 and x.ndim == 4 and len(x[0, :, 0, 0]) == 4:
            return x * 2
        return x


def test_a_size_that_decides_holds_the_graph_to_it() -> None:
    model = net(DecidesBySize())
    graph = assert_traced_right(model)
    (place,) = graph.fixed_by
    assert "trap" in place
    assert "test_tracer_traps.py" in place
    with pytest.raises(AssertionError, match=r"for images of 32 x 32.*trap.*trace the model again"):
        graph(images(size=64))
    with pytest.raises(TraceError, match="trace the model itself again"):
        vx.trace(graph, input_size=(3, 64, 64))
    larger = vx.trace(model, input_size=(3, 64, 64))
    assert identical(larger.eval()(images(size=64)), model.eval()(images(size=64)))


def test_what_is_decided_by_channels_takes_any_size() -> None:
    graph = assert_traced_right(net(DecidesByChannels()), 32, 64, 40)
    assert graph.fixed_by == ()


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_nfnet"])
def test_a_convolutional_net_takes_any_size(name: str) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    graph = vx.trace(model, input_size=(3, 64, 64)).eval()
    assert graph.fixed_by == ()
    for size in (32, 64, 97):
        assert identical(graph(images(size=size)), model(images(size=size)))


def test_an_unknown_size_is_asked_for() -> None:
    with pytest.raises(TraceError, match=r"how large the images are is not known.*input_size"):
        vx.trace(DecidesBySize())


# Buffers and caches


class RemembersInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3))
        return x - self.mean.view(-1, 1, 1)


class CountsByReplacing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x * self.count


class RemembersInAPlainTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3))
        return x - self.mean.view(-1, 1, 1)


class CountsInAPlainTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


@pytest.mark.parametrize(
    "trap", [RemembersInABuffer, CountsByReplacing, RemembersInAPlainTensor, CountsInAPlainTensor]
)
def test_what_a_forward_remembers_in_a_tensor_it_replaces_stays_its_own(trap: type[nn.Module]) -> None:
    model = net(trap())
    twin = copy.deepcopy(model)
    graph = vx.trace(twin, input_size=SIZE)
    (closed,) = graph.closed
    assert closed.path == "trap"
    assert "keeps what" in closed.reason
    assert_computes_the_same(graph, model, images())
    with pytest.raises(TraceError, match="keeps what"):
        vx.trace(trap(), input_size=(4, 32, 32))


class SetsItemsOfATensorThatItMakes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        part = torch.zeros(2, 2)
        part[0] = x.mean()
        return x + part.sum()


class AddsToATensorThatItMakes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(4)
        same = total
        total += x.mean((0, 2, 3))
        return x + same.view(1, -1, 1, 1)


@pytest.mark.parametrize("trap", [SetsItemsOfATensorThatItMakes, AddsToATensorThatItMakes])
def test_data_written_into_a_tensor_made_from_numbers_closes_the_part(trap: type[nn.Module]) -> None:
    model = net(trap())
    graph = vx.trace(copy.deepcopy(model), input_size=SIZE)
    (closed,) = graph.closed
    assert closed.path == "trap"
    assert "x.new_zeros(...)" in closed.reason
    assert_computes_the_same(graph, model, images())


def test_attention_maps_that_are_kept_for_looking_at_do_no_harm() -> None:
    class Shows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x * 2
            return self.seen + 1

    model = net(Shows())
    model(images())
    graph = vx.trace(model, input_size=SIZE)
    assert not graph.closed
    assert isinstance(model.trap.seen, Tensor)


def test_a_cache_filled_before_tracing_is_not_baked_in() -> None:
    model = timm.create_model("levit_128s", num_classes=10, img_size=32).eval()
    x = images()
    model(x)
    assert any(part.attention_bias_cache for part in model.modules() if hasattr(part, "attention_bias_cache"))
    graph = vx.trace(model, input_size=SIZE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention_biases" in name:
                parameter.normal_()
    fresh = timm.create_model("levit_128s", num_classes=10, img_size=32).eval()
    fresh.load_state_dict(model.state_dict())
    for mode in (False, True, False):
        torch.manual_seed(1)
        expected = copy.deepcopy(fresh).train(mode)(x)
        torch.manual_seed(1)
        assert identical(copy.deepcopy(graph).train(mode)(x), expected)


def test_constants_keep_the_precision_that_forward_gives_them() -> None:
    class Waves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.linspace(0, 1, 7).sum()

    model = net(Waves()).bfloat16().eval()
    graph = vx.trace(net(Waves()), input_size=SIZE).bfloat16().eval()
    x = images().bfloat16()
    assert identical(graph(x), model(x))


# Hooks, modes and owners


def _add_one(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1


def _double(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * 2,)


@pytest.mark.parametrize("path", ["", "stem", "trap", "head"])
def test_forward_hooks_are_kept(path: str) -> None:
    model = net(nn.Sequential(nn.ReLU()))
    plain = model.eval()(images())
    model.get_submodule(path).register_forward_hook(_add_one)
    model.get_submodule(path).register_forward_pre_hook(_double)
    assert not identical(model(images()), plain)
    assert_traced_right(model)


@pytest.mark.parametrize("path", ["", "trap", "head"])
def test_backward_hooks_are_kept(path: str) -> None:
    model = net(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)))
    seen: list[Tensor] = []
    model.get_submodule(path).register_full_backward_hook(lambda m, i, o: seen.append(o[0].clone()))
    graph = vx.trace(model, input_size=SIZE)
    assert [closed.path for closed in graph.closed] == (["trap"] if path == "trap" else [])
    for module in (model, graph):
        module(images()).square().sum().backward()
    one, two = seen
    assert identical(one, two)


def test_a_forward_of_the_instance_wins_over_that_of_the_class() -> None:
    model = net(nn.ReLU())
    model.forward = MethodType(lambda self, x: self.head(self.stem(x).mean((2, 3))) + 1, model)
    graph = vx.trace(model, input_size=SIZE)
    assert identical(graph.eval()(images()), model.eval()(images()))


class KeepsPartsFrozen(nn.Module):
    """As detectors do: some parts stay in evaluation, and their parameters fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.attend = timm.layers.Attention(8, num_heads=2, attn_drop=0.5)
        self.free = nn.Sequential(nn.Linear(8, 10), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.attend(self.frozen(x).flatten(2).transpose(1, 2)).mean(1))

    def train(self, mode: bool = True) -> KeepsPartsFrozen:
        super().train(mode)
        self.frozen.eval()
        self.attend.eval()
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)
        return self


def _deepcopied(graph: nn.Module) -> nn.Module:
    return copy.deepcopy(graph)


def _pickled(graph: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(graph))


@pytest.mark.parametrize("way", [lambda graph: graph, _deepcopied, _pickled, vx.trace])
def test_parts_that_the_models_own_train_keeps_frozen_stay_frozen(way: Callable[..., nn.Module]) -> None:
    model = KeepsPartsFrozen()
    twin = copy.deepcopy(model)
    before = fingerprint(twin)
    graph = way(vx.trace(twin))
    assert_same_module(twin, before)
    for mode in (True, False, True):
        model.train(mode)
        graph.train(mode)
        parts = dict(graph.named_modules())
        assert all(
            parts[path].training is part.training for path, part in model.named_modules() if path in parts
        )
        for part in parts.values():
            if type(part).__name__ == "ModeSwitch":
                assert not part.training
    twin.frozen.requires_grad_(False)
    graph.requires_grad_(True)
    graph.get_submodule("frozen").requires_grad_(False)
    assert_computes_the_same(graph, model, images())


@pytest.mark.parametrize("family", ["mixer", "deit", "poolformer"])
@pytest.mark.parametrize("way", [_deepcopied, _pickled])
def test_nodes_keep_their_names_and_owners(family: str, way: Callable[..., Any]) -> None:
    graph = vx.trace(small(family))
    kept = [(node.name, node.op, str(node.args), owner(node)) for node in way(graph).graph.nodes]
    assert kept == [(node.name, node.op, str(node.args), owner(node)) for node in graph.graph.nodes]
    assert len({place for *_, place in kept}) > 5


@pytest.mark.parametrize("name", ["info", "graph", "meta"])
def test_a_part_that_a_traced_module_could_not_reach_is_refused(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Conv2d(3, 4, 1))
    with pytest.raises(TraceError, match=f"has a part '{name}'.*rename"):
        vx.trace(model)
    graph = vx.trace(nn.Sequential(model))
    assert identical(graph(images()), model(images()))


def test_a_model_made_on_meta_is_traced_without_memory() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_giant_patch14_224", num_classes=10)
    graph = vx.trace(model)
    assert {p.device.type for p in graph.parameters()} == {"meta"}
    assert graph(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 10)


class Rolled(nn.Module):
    """Where it rolls to depends on how many axes there are, so tracing asks for a shape."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x, 1, x.dim() - 1)


def test_a_weight_that_writes_as_it_is_read_is_not_read_for_a_shape() -> None:
    model = net(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), Rolled()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vx.trace(model, input_size=SIZE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
