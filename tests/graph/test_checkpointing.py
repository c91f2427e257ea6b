"""Blocks run again in the backward pass: nothing changes but the memory."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.nn.parallel import DistributedDataParallel

import vmkd_fx as vx
from tests.models import images, small
from tests.slow import rest_slow
from vmkd_fx.errors import MatchError
from vmkd_fx.graph import checkpointing
from vmkd_fx.graph.traced import TracedModule

# How many times fewer bytes a training step keeps at least. The small ResNet has one block out of four whose
# shortcut is no projection, so that one alone runs again.
FAMILIES = {"mixer": 4.0, "deit": 5.0, "poolformer": 3.0, "test_convnext": 5.0, "test_resnet": 1.1}


def student(name: str) -> TracedModule:
    if name in ("mixer", "deit", "poolformer"):
        model = small(name)
    else:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10, drop_rate=0.1, drop_path_rate=0.1)
    with torch.no_grad():
        for parameter in model.parameters():  # behind a head of zeros every gradient is zero
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return vx.trace(model).train()


def pair(name: str) -> tuple[TracedModule, TracedModule]:
    """Two copies of a student, the second of which runs its blocks again."""
    plain = student(name)
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing()
    return plain, again


def step(module: nn.Module, x: torch.Tensor, seed: int = 3) -> dict[str, torch.Tensor]:
    """Everything that a training step leaves behind, by name."""
    module.zero_grad()
    torch.manual_seed(seed)
    outputs = module(x)
    outputs = outputs if isinstance(outputs, dict) else {"logits": outputs}
    torch.stack([value.float().square().sum() for value in outputs.values()]).sum().backward()
    left = {f"output {name}": value.detach() for name, value in outputs.items()}
    left |= {
        f"gradient {name}": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
    }
    return left | {f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()}


def differing(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == two.keys()
    assert sum(name.startswith("gradient") and bool(value.any()) for name, value in one.items()) > 3
    return [name for name in one if not torch.equal(one[name], two[name])]


def kept_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes of activations that live between the forward and the backward pass."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = module(x)  # noqa: F841 - freed storages would share addresses
    return sum(kept.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_is_the_same_and_keeps_less(name: str) -> None:
    plain, again = pair(name)
    x = images(8, plain.info.need_input_size()[-1])

    for seed in (3, 4):  # the second step starts from the statistics that the first one left
        expected = step(plain, x, seed)
        assert differing(expected, step(again, x, seed)) == []
    assert not torch.equal(expected["output logits"], step(plain, x, 5)["output logits"]), (
        "nothing is dropped"
    )
    assert kept_bytes(plain, x) > FAMILIES[name] * kept_bytes(again, x)


def test_the_graph_its_code_and_its_keys_stay() -> None:
    plain, again = pair("deit")
    assert again.code == plain.code
    assert str(again.graph) == str(plain.graph)
    assert list(again.state_dict()) == list(plain.state_dict())
    again.load_state_dict(plain.state_dict())


def test_statistics_are_updated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, again = pair("test_resnet")
    x = images(2, 64)
    expected = step(plain, x)
    identities = {name: id(buffer) for name, buffer in again.named_buffers()}
    assert expected["buffer layer1.0.bn1.num_batches_tracked"] == 1
    assert differing(expected, step(again, x)) == []
    assert {name: id(buffer) for name, buffer in again.named_buffers()} == identities

    nothing = contextlib.nullcontext()
    monkeypatch.setattr(checkpointing, "_contexts", lambda module, segment: (nothing, nothing))
    plain, again = pair("test_resnet")
    wrong = differing(step(plain, x), step(again, x))
    assert "buffer layer1.0.bn1.num_batches_tracked" in wrong
    assert "buffer layer1.0.bn1.running_mean" in wrong


class Counting(nn.Module):
    """A block that depends on a buffer of its own and changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x + torch.tanh(self.conv(x) / self.calls)


class Around(nn.Module):
    """A model in another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Net(nn.Module):
    """A stem, blocks and a head for images of 16x16."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.num_classes = 10
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def net(*blocks: nn.Module) -> TracedModule:
    torch.manual_seed(0)
    return vx.trace(Net(*blocks), input_size=(3, 16, 16)).train()


def checkpointed(module: TracedModule) -> TracedModule:
    """A copy that runs its blocks again, in the same state."""
    again = copy.deepcopy(module)
    again.set_grad_checkpointing()
    again.load_state_dict(module.state_dict())  # looking for blocks runs a forward, which counts too
    return again


def test_what_a_block_reads_and_changes_is_as_it_was_then() -> None:
    plain = net(Counting(), Counting())
    again = checkpointed(plain)
    for _ in range(2):
        assert differing(step(plain, images(2, 16)), step(again, images(2, 16))) == []
    assert torch.equal(again.get_buffer("blocks.0.calls"), plain.get_buffer("blocks.0.calls"))


class Overwriting(nn.Module):
    """A block that writes over what enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(F.relu(x, inplace=True))


def test_a_block_that_cannot_be_repeated_is_kept() -> None:
    plain = net(Counting(), Overwriting(), Counting())
    again = checkpointed(plain)
    ends = again.meta["grad_checkpointing"]
    assert [segment.repeatable for segment in checkpointing.cut(again, ends)] == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert differing(step(plain, images(2, 16)), step(again, images(2, 16))) == []


def switch_precision(module: TracedModule, first: str, last: str) -> None:
    """Let the nodes from `first` to `last` run in bfloat16."""
    nodes = {node.name: node for node in module.graph.nodes}
    with module.graph.inserting_before(nodes[first]):
        entered = module.graph.call_function(_enter_autocast, ("cpu", torch.bfloat16, True, None))
    with module.graph.inserting_after(nodes[last]):
        module.graph.call_function(_exit_autocast, (entered,))
    module.recompile()


@pytest.mark.parametrize("last", ["tanh", "add", "blocks_2_conv"])
def test_a_switched_precision_is_switched_back(last: str) -> None:
    plain = net(Counting(), Counting(), Counting())
    switch_precision(plain, "blocks_0_conv", last)
    again = checkpointed(plain)
    assert differing(step(plain, images(2, 16)), step(again, images(2, 16))) == []
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    assert nesting == 1


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (
            lambda: vx.trace(nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), input_size=(3, 4, 4)),
            "none is found in this model",
        ),
        (lambda: net(Overwriting(), Overwriting()), "none of the 2 found can"),
    ],
)
def test_a_model_without_such_blocks_is_refused(make: Callable[[], TracedModule], found: str) -> None:
    module = make()
    with pytest.raises(MatchError, match=rf"set_grad_checkpointing\(\) runs .* {found}.*torch.autocast"):
        module.set_grad_checkpointing()
    assert "grad_checkpointing" not in module.meta
    module.set_grad_checkpointing(False)


def test_it_acts_in_training_with_gradients_alone() -> None:
    plain, again = pair("deit")
    x = images()
    less = kept_bytes(again, x)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = plain(x)
        torch.manual_seed(1)
        assert torch.equal(again(x), expected)
    plain.eval()
    again.eval()
    assert torch.equal(again(x), plain(x))
    assert kept_bytes(again, x) == kept_bytes(plain, x) > less
    assert kept_bytes(again.train(), x) == less
    again.set_grad_checkpointing(False)
    assert kept_bytes(again, x) == kept_bytes(plain.train(), x) > less


@pytest.mark.parametrize(
    "remake", [copy.copy, copy.deepcopy, vx.trace, lambda m: pickle.loads(pickle.dumps(m))]
)
@pytest.mark.parametrize("name", ["mixer", "test_resnet"])
def test_copies_keep_it(remake: Callable[[Any], TracedModule], name: str) -> None:
    plain, again = pair(name)
    x = images(2, plain.info.need_input_size()[-1])
    other = remake(again)
    assert kept_bytes(other, x) == kept_bytes(again, x) < kept_bytes(plain, x)
    plain.load_state_dict(other.state_dict())
    assert differing(step(plain, x), step(other, x)) == []


def test_a_copy_is_switched_by_itself() -> None:
    plain = student("mixer")
    other = vx.trace(plain)
    other.set_grad_checkpointing()
    assert kept_bytes(plain, images()) > kept_bytes(other, images())


def test_injections_keep_it_and_strip_takes_them_out() -> None:
    teacher, x = small("deit"), images(8)
    plain, again = pair("mixer")
    with_tokens = [
        vx.wrap(module, "std", teachers=[teacher]).get_trainable_module().train() for module in (plain, again)
    ]
    with_tokens[1].load_state_dict(with_tokens[0].state_dict())
    assert differing(step(with_tokens[0], x), step(with_tokens[1], x)) == []
    assert kept_bytes(with_tokens[0], x) > 2 * kept_bytes(with_tokens[1], x)

    stripped = vx.strip(with_tokens[1])
    assert stripped.code == plain.code
    assert kept_bytes(stripped.train(), x) == kept_bytes(again, x)
    lowered = vx.lower(with_tokens[1])
    torch.testing.assert_close(lowered(x), again.eval()(x), rtol=1e-5, atol=1e-5)


def test_gradients_can_be_asked_for_twice() -> None:
    plain, again = pair("test_resnet")
    left = []
    for module in (plain, again):
        torch.manual_seed(0)
        loss = module(images(2, 64)).sum() + module(images(2, 64, seed=1)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients = {f"gradient {name}": p.grad for name, p in module.named_parameters()}
        left.append(gradients | dict(module.named_buffers()))
    assert differing(*left) == []


def test_under_autocast() -> None:
    plain, again = pair("deit")
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(plain, images())
        assert expected["output logits"].dtype == torch.bfloat16
        assert differing(expected, step(again, images())) == []


def test_a_model_around_it_is_still_traced_open() -> None:
    _, again = pair("deit")
    torch.manual_seed(1)
    expected = again(images())
    around = vx.trace(Around(again), input_size=(3, 32, 32)).train()
    torch.manual_seed(1)
    assert torch.equal(around(images()), expected)
    assert len(around.graph.nodes) >= len(again.graph.nodes)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["mixer", "test_resnet"])
@pytest.mark.usefixtures("process_group")
def test_under_distributed_data_parallel(name: str) -> None:
    plain, again = (DistributedDataParallel(module) for module in pair(name))
    x = images(2, plain.module.info.need_input_size()[-1])
    for seed in (3, 4):
        assert differing(step(plain, x, seed), step(again, x, seed)) == []
    assert kept_bytes(again, x) < kept_bytes(plain, x)


# Without dropout: a compiled graph draws other random numbers.
@pytest.mark.parametrize("name", rest_slow(["test_resnet", "test_vit"], 0))
def test_compiled_as_one_graph(name: str) -> None:
    torch.manual_seed(0)
    plain = vx.trace(timm.create_model(name, num_classes=10)).train()
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing()
    x = images(2, plain.info.need_input_size()[-1])
    reference = step(copy.deepcopy(plain), x)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager_decomp_partition")
    compiled_again = torch.compile(again, fullgraph=True, backend="aot_eager_decomp_partition")
    got = {name.replace("_orig_mod.", ""): value for name, value in step(compiled_again, x).items()}
    torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-5)
    assert kept_bytes(compiled, x) > kept_bytes(compiled_again, x)
