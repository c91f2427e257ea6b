"""The task as timm's class defines it: what a loop of timm's asks of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.task._helpers import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from tests.distill.methods.pairs import PAIRS, Pair
from tests.models import images, small
from vmkd_fx.distill.methods import Batch
from vmkd_fx.distill.task import DistillationTask

STD = Pair("std", student="mixer", teachers=("resnet",), settings={"information": 0.1})
LABELS = torch.arange(4) % 10


class Recording(nn.CrossEntropyLoss):
    """Remembers in what precision it was asked, and whether under autocast."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        self.asked = (input.dtype, torch.is_autocast_enabled("cpu"))
        return super().forward(input, target)


def state(task: DistillationTask, ema: bool = False) -> dict[str, Tensor]:
    module = task.get_trainable_module(ema=ema)
    return (module.module if ema else module).state_dict()


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def stirred(task: DistillationTask) -> DistillationTask:
    """With an average, and every parameter moved away from its start and from that average."""
    task.setup_ema(decay=0.5)
    with torch.no_grad():
        for parameter in task.trainable_module.parameters():
            parameter.add_(torch.randn_like(parameter))
    task.update_ema(step=2)
    return task


SOME = ("std", "vitkd+nkd", "riformer")


@pytest.mark.parametrize(
    ("pair", "dtype"),
    [
        (STD, torch.float16),
        *(
            pytest.param(pair, torch.bfloat16, marks=() if pair.preset in SOME else pytest.mark.slow)
            for pair in PAIRS
        ),
    ],
    ids=lambda value: getattr(value, "preset", str(value)),
)
def test_losses_are_in_float32_under_autocast(
    pair: Pair, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion = Recording()
    task = pair.wrap(criterion=criterion).train()
    seen: list[Batch] = []
    for method in task.methods:
        terms = type(method).terms
        monkeypatch.setattr(
            type(method), "terms", lambda self, batch, t=terms: (seen.append(batch), t(self, batch))[1]
        )
    size = task.trainable_module.info.need_input_size()[1]
    with torch.autocast("cpu", dtype=dtype):
        found = task(images(4, size), LABELS)
    assert found["output"].dtype == dtype
    assert criterion.asked == (torch.float32, False)
    losses = {name: value for name, value in found.items() if name != "output"}
    assert {value.dtype for value in losses.values()} == {torch.float32}
    floats = [
        value
        for one in (seen[0].outputs, *seen[0].teachers)
        for value in one.values()
        if value.is_floating_point()
    ]
    assert {value.dtype for value in floats} == {torch.float32}
    found["loss"].backward()
    exact = task.eval()(images(4, size), LABELS)["class_loss"]
    assert abs(found["class_loss"].item() - exact.item()) < 0.5


def test_a_half_student_has_losses_in_float32() -> None:
    task = STD.wrap().eval().to(torch.bfloat16)
    found = task(images(4, dtype=torch.bfloat16), LABELS)
    assert found["output"].dtype == torch.bfloat16 and found["loss"].dtype == torch.float32


def test_the_checkpoint_is_the_students_own_and_what_was_added(tmp_path: Path) -> None:
    task = stirred(STD.wrap())
    written = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert set(written) == {"state_dict", "task_state", "state_dict_ema", "task_state_ema"}
    small("mixer").load_state_dict(written["state_dict"], strict=True)
    small("mixer").load_state_dict(written["state_dict_ema"], strict=True)
    torch.save({**written, "epoch": 3, "version": 2}, tmp_path / "last.pth.tar")

    again = STD.wrap()
    again.setup_ema()
    assert resume_task_checkpoint(again, str(tmp_path / "last.pth.tar"), log_info=False) == 4
    load_task_ema_checkpoint(again, str(tmp_path / "last.pth.tar"))
    for ema in (False, True):
        assert_same_state(state(again, ema), state(task, ema))
    assert not torch.equal(state(task)["head.weight"], state(task, ema=True)["head.weight"])


def test_a_student_without_additions_has_no_task_state() -> None:
    task = Pair("kd", student="mixer", teachers=("resnet",)).wrap()
    assert set(task.get_checkpoint_state()) == {"state_dict"}


def test_weights_of_the_student_alone_leave_what_was_added() -> None:
    task, other = stirred(STD.wrap()), STD.wrap()
    before = other.get_task_state()["vmkd"]
    kept = {key: value.clone() for key, value in before.items()}
    other.load_checkpoint_state(task.get_checkpoint_state()["state_dict"])
    assert_same_state(other.get_task_state()["vmkd"], kept)
    other.load_checkpoint_state(state(task))  # both in one, as the state dict of the module has them
    assert_same_state(state(other), state(task))


def test_wrong_keys_are_refused_if_strict() -> None:
    task = STD.wrap()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*typo"):
        task.load_checkpoint_state({"typo": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"no moving average.*setup_ema"):
        task.load_checkpoint_state({}, ema=True)
    task.load_checkpoint_state({"typo": torch.zeros(1)}, strict=False)


@pytest.mark.slow
def test_an_average_of_a_compiled_student_is_a_plain_copy_and_compiles() -> None:
    task = STD.wrap()
    task.compile(backend="eager")
    stirred(task).eval()
    assert (
        task.trainable_module_ema.module.state_dict().keys()
        == STD.wrap().trainable_module.state_dict().keys()
    )
    expected = task.get_eval_model(ema=True)(images(2))
    compiled = task.compile_ema(backend="eager")
    assert compiled is task.get_eval_model(ema=True)
    torch.testing.assert_close(compiled(images(2)), expected)
    assert task.get_eval_model(ema=True, predict="dist")(images(2)).shape == (2, 10)


def test_clipping_without_the_head_leaves_out_the_students_head() -> None:
    task = STD.wrap()
    names = {id(parameter): name for name, parameter in task.trainable_module.named_parameters()}
    every, some = (
        [names[id(p)] for p in task.get_clip_parameters(exclude_head=head)] for head in (False, True)
    )
    assert set(every) == set(names.values())
    assert set(every) - set(some) == {"head.weight", "head.bias"}
    task.train()(images(4), LABELS)["loss"].backward()
    for mode in ("norm", "value", "agc"):
        dispatch_clip_grad(task.get_clip_parameters(exclude_head=mode == "agc"), 0.1, mode=mode)


@pytest.fixture
def group(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_distributed_task(group: None) -> None:
    alone = stirred(STD.wrap())
    names = list(state(alone))
    task = alone.prepare_distributed(find_unused_parameters=False)
    assert isinstance(task.trainable_module, nn.parallel.DistributedDataParallel)
    assert not isinstance(task.get_eval_model().student, nn.parallel.DistributedDataParallel)
    written = task.get_checkpoint_state()
    assert {*written["state_dict"], *written["task_state"]["vmkd"]} == set(names)
    with task.no_sync():
        task.train()(images(4), LABELS)["loss"].backward()
    task.update_ema(step=2)
    assert len(list(task.get_clip_parameters())) == len(list(task.trainable_module.parameters()))
