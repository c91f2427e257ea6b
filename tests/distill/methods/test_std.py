"""STD as a method: its settings, its terms, and one gradient in several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import vmkd_fx as vx
from tests.checks import assert_is
from tests.models import images, small
from vmkd_fx.distill.methods import resolve
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.errors import RecipeError, TrainingError, UnknownNameError
from vmkd_fx.graph.share import unwrapped

WORLD = 2
BATCH = 8
WEIGHT = 0.3


def teacher(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=10)


def wrapped(family: str = "mixer", **settings: Any) -> DistillationTask:
    return vx.wrap(small(family), "std", [teacher(0), teacher(1)], **settings)


def targets(count: int) -> torch.Tensor:
    return torch.arange(count) % 10


def test_the_information_is_a_weighted_term() -> None:
    task = wrapped(information=WEIGHT).train()
    found = task(images(4), targets(4))
    expected = 0.5 * (found["class_loss"] + found["std/0"] + found["std/1"])
    torch.testing.assert_close(found["loss"], expected + WEIGHT * found["std/information"])
    found["loss"].backward()
    assert all(p.grad is not None for p in task.trainable_module.parameters())


def test_evaluation_loses_nothing_to_it() -> None:
    task = wrapped(information=WEIGHT).eval()
    found = task(images(1), targets(1))
    assert found["std/information"] == 0
    torch.testing.assert_close(found["loss"], 0.5 * (found["class_loss"] + found["std/0"] + found["std/1"]))


def test_without_a_weight_there_is_no_network() -> None:
    task = wrapped()
    assert not any("information" in name for name in task.trainable_module.state_dict())
    assert "std/information" not in task(images(2), targets(2))


def test_one_image_in_a_step_is_refused() -> None:
    with pytest.raises(TrainingError, match="the batch has 1"):
        wrapped(information=WEIGHT).train()(images(1), targets(1))


@pytest.mark.parametrize("tokens", ["spatial", "channel"])
def test_one_kind_of_token(tokens: str) -> None:
    task = wrapped(tokens=tokens).train()
    task(images(2), targets(2))["loss"].backward()
    parameters = dict(task.trainable_module.named_parameters())
    mine = [name for name in parameters if name.startswith("vmkd.std.")]
    assert any(f"mlp_{tokens}" in name for name in mine)
    assert not any(f"mlp_{'spatial' if tokens == 'channel' else 'channel'}" in name for name in mine)
    with pytest.raises(RecipeError, match=f"tokens='{tokens}' leaves one kind; take tokens='both'"):
        wrapped(tokens=tokens, information=WEIGHT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"information": -1}, "0 or above"),
        ({"blocks": 0}, "one token block"),
        ({"positions": ()}, "got none"),
        ({"tokens": "all"}, "Known: both, channel, spatial"),
    ],
)
def test_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((RecipeError, UnknownNameError), match=message):
        resolve("std", settings)


def test_an_intermediate_teacher_with_everything() -> None:
    """A teacher at two thirds of the depth, one at the end, information, and any prediction of table 6."""
    model = small("mixer")
    task = vx.wrap(model, "std-intermediate", [teacher(0), teacher(1)], information=WEIGHT).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        task(images(4), targets(4))["loss"].backward()
        optimizer.step()
    assert_is(vx.strip(task), model, images(2))

    student = task.trainable_module.eval()
    outputs = student(images(2))
    dist_mean = (outputs["std/0"] + outputs["std/1"]) / 2
    wanted = {
        "class": outputs["logits"],
        "dist": dist_mean,
        "mean": (outputs["logits"] + dist_mean) / 2,
    }
    for predict, expected in wanted.items():
        torch.testing.assert_close(vx.strip(task, predict).eval()(images(2)), expected)
        torch.testing.assert_close(task.get_eval_model(predict=predict)(images(2)), expected)
    lowered = vx.lower(task, predict="mean")
    torch.testing.assert_close(lowered(images(2)), wanted["mean"], rtol=1e-4, atol=1e-5)
    assert not any("information" in name for name in lowered.state_dict())


def distributed_task() -> DistillationTask:
    """The same in every process: no dropout, float64."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    student = MlpMixer(num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=24).double()
    teachers = [teacher(seed).double() for seed in (0, 1)]
    task = vx.wrap(student, "std", teachers, information=WEIGHT, input_size=(3, 32, 32))
    return task.train()


def step(task: DistillationTask, rank: int) -> dict[str, torch.Tensor]:
    """The gradients of a process's part of the batch, with its own derangement."""
    part = slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)
    torch.manual_seed(rank)
    task(images(BATCH, dtype=torch.float64)[part], targets(BATCH)[part])["loss"].backward()
    parameters = unwrapped(task.trainable_module).named_parameters()
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        task = distributed_task().prepare_distributed()
        found = step(task, rank)
        task.trainable_module.zero_grad()
        step(task, rank)  # buffers of the first process go to all before the second step
        torch.save((found, unwrapped(task.trainable_module).state_dict()), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_mean_of_their_gradients(tmp_path: Path) -> None:
    """Ascent and descent survive it: the pairs are drawn inside each process."""
    multiprocessing.spawn(process, args=(str(tmp_path),), nprocs=WORLD)
    (first, state), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    alone = [step(distributed_task(), rank) for rank in range(WORLD)]
    assert (
        list(first)
        == list(alone[0])
        == [name for name, _ in distributed_task().trainable_module.named_parameters()]
    )
    network = [name for name in first if "std.information.network" in name]
    assert network
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name])
        expected = (alone[0][name] + alone[1][name]) / WORLD
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-14)
    assert any((alone[0][name] - alone[1][name]).abs().max() > 1e-6 for name in network)
    assert state["vmkd.std.information.loss.batches"] == 2
