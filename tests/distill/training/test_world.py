from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmkd_fx.distill.run_folder import LOG
from vmkd_fx.distill.training.world import joined_world
from vmkd_fx.errors import OutputError, RecipeError, TrainingError

RECIPE = """
student: {model: mixer_nano_32, options: {img_size: 16, num_blocks: 2, embed_dim: 24}}
teachers: [{model: test_resnet}]
method: {preset: std, information: 0.1}
data: {name: digits, labelled: 80, image_size: 16}
train: {epochs: 2, batch_size: 16, ema_decay: 0.9, device: cpu}
"""


def test_one_process_talks_to_nobody() -> None:
    with joined_world("cpu") as world:
        assert (world.rank, world.size, world.first, world.joined) == (0, 1, True, False)
        assert world.gathered(3) == [3] and world.from_first(lambda: 4) == 4
        assert world.any(True) and not world.any(False)
        values = torch.ones(2)
        assert world.total(values) is values
        with pytest.raises(OutputError):
            world.from_first(refuse)


def refuse() -> None:
    raise OutputError("the disk is full")


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "'gpu'; give cpu, cuda, or a GPU"), ("cuda:99", "GPU 99 is needed and \\d+ can be used")],
)
def test_a_device_that_is_not_there(device: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message), joined_world(device):
        pass


def talk(rank: int, size: int, folder: Path) -> None:
    with joined_world("cpu") as world:  # the group that is there, of which the environment says nothing
        assert (world.rank, world.size) == (rank, size)
    assert world.gathered(rank) == [0, 1]
    assert world.from_first(lambda: f"from {rank}") == "from 0"
    assert world.any(rank == 1) and not world.any(False)
    assert world.total(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank + 5)
    world.share_buffers(norm, None)
    assert norm.running_mean.tolist() == [5, 5]
    try:
        world.from_first(refuse)
    except OutputError:
        said = "refused"
    except TrainingError as error:
        said = str(error)
    (folder / str(rank)).write_text(said)


def test_two_processes(tmp_path: Path) -> None:
    from tests.distill.processes import Group

    assert Group(tmp_path, 2, talk, tmp_path).wait() == [0, 0]
    assert (tmp_path / "0").read_text() == "refused"
    said = "process 1 ends because process 0 refused: the disk is full"
    assert (tmp_path / "1").read_text() == said


@pytest.mark.slow
@pytest.mark.parametrize("distributed", ["ddp", "fsdp"])
def test_torchrun(tmp_path: Path, distributed: str) -> None:
    """The command as a user types it, with the same result as one process."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    losses = []
    for size in (1, 2):
        out = tmp_path / str(size)
        command = [*torchrun, str(size), "-m", "vmkd_fx", "train", str(recipe), f"out={out}"]
        done = subprocess.run([*command, f"train.distributed={distributed}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("accuracy") == 1, done.stdout
        lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
        assert lines[0]["processes"] == size
        losses.append([line["loss"] for line in lines if line["event"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
