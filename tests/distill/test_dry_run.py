"""`vmkd train --dry-run`, and the estimate of memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from vmkd_fx.cli import main
from vmkd_fx.distill.checkpoint import rng_state
from vmkd_fx.distill.data import open_data
from vmkd_fx.distill.dry_run import DryRun
from vmkd_fx.distill.recipe import Recipe, TrainConfig
from vmkd_fx.distill.training import memory
from vmkd_fx.distill.training.memory import LiveTensors, Memory, estimate, in_bytes
from vmkd_fx.distill.training.optimisation import make_optimizer
from vmkd_fx.distill.training.world import World
from vmkd_fx.errors import CheckpointError

WORLD = World(torch.device("cpu"))
RECIPE = """\
student: {{model: mixer_nano_32, options: {{img_size: 16}}}}
teachers: [{{model: test_resnet}}]
method: {{preset: std, distillation: soft}}
data: {{name: digits, labelled: 60, image_size: 16}}
train: {{epochs: 2, batch_size: 30, checkpoint_every: 1, evaluate_first: false}}
out: {out}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(out=tmp_path / "out"), encoding="utf-8")
    return path


def dry(recipe: Path, *overrides: str) -> int:
    return main(["train", str(recipe), *overrides, "--dry-run"])


def test_it_says_what_will_be_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry(recipe) == 0
    said = capsys.readouterr().out
    assert "mixer_nano_32" in said and "test_resnet" in said
    assert "digits, 60 training images in 10 classes" in said
    assert "4 steps of 30 images, 2 epochs" in said
    assert "std/0" in said and "activations of 30 images" in said
    assert "from the beginning" in said and said.rstrip().endswith("nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("teachers.0.checkpoint=gone.safetensors", "there is no weights file gone.safetensors"),
        ("student.options={num_classes: 7, img_size: 16}", "knows 7 classes and the data set digits has 10"),
        ("train.accumulation=7", "must be a multiple of"),
        ("data=/no/such/folder", "root has no meaning for the data set digits"),
        ("data={name: folder, root: /no/such/folder}", "/no/such/folder"),
    ],
)
def test_it_refuses_what_a_training_would(
    recipe: Path, override: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry(recipe, override) == 2
    assert expected in capsys.readouterr().err


def test_the_output_folder_is_looked_at(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe)]) == 0
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir())
    assert dry(recipe) == 0
    assert "holds this training, finished" in capsys.readouterr().out
    assert dry(recipe, "train.lr=0.5") == 2
    assert "finished training of another recipe" in capsys.readouterr().err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()) == before


@pytest.mark.slow
def test_an_unfinished_training_is_named_with_its_step(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vmkd_fx.distill.training.run import Run

    def breaks(*_: Any) -> None:
        raise CheckpointError("the end")

    monkeypatch.setattr(Run, "_end_epoch", breaks)
    assert main(["train", str(recipe)]) == 2
    assert dry(recipe) == 0
    assert "holds this training up to step 1, from which it would go on" in capsys.readouterr().out
    assert dry(recipe, "train.lr=0.5") == 2
    assert "lr was 0.001 and is 0.5" in capsys.readouterr().err


def test_what_does_not_fit_is_said_before_the_first_step(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 20 * 2**20)
    assert dry(recipe) == 2
    said = capsys.readouterr().err
    assert "this training needs about" in said and "20.0 MiB are free: train.accumulation=" in said
    pieces = said.partition("train.accumulation=")[2].split()[0]
    assert dry(recipe, f"train.accumulation={pieces}") == 0


@pytest.mark.slow
def test_a_training_that_starts_all_the_same_says_it_too(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 20 * 2**20)
    assert main(["train", str(recipe), "train.epochs=1"]) == 0
    assert "this training needs about" in capsys.readouterr().err


def task(student: str = "test_vit", method: str = "vitkd", **options: Any) -> Any:
    torch.manual_seed(0)
    made = timm.create_model(student, num_classes=10, **options)
    return vx.wrap(made, method, timm.create_model("test_resnet", num_classes=10), epochs=4)


DIGITS = open_data("digits", labelled=100, image_size=32)


@pytest.mark.parametrize(
    ("student", "options", "ema"), [("test_vit", {"img_size": 32}, 0.9), ("test_resnet", {}, None)]
)
def test_the_estimate_is_what_a_step_takes(student: str, options: dict[str, Any], ema: float | None) -> None:
    """Against every tensor that lives while two steps are done."""
    config = TrainConfig(batch_size=48, ema_decay=ema)
    made = task(student, "kd", **options)
    found = estimate(made, DIGITS, config, WORLD)
    images, targets = torch.randn(48, 3, 32, 32), torch.arange(48) % 10
    with LiveTensors(made) as live:
        if ema:
            made.setup_ema(decay=ema)
        optimizer = make_optimizer(made.get_trainable_module(), config)
        for _ in range(2):
            optimizer.zero_grad()
            made.train()(images, targets)["loss"].backward()
            optimizer.step()
            made.update_ema()
    needed = found.gradients + found.optimizer + found.average + found.activations - images.nbytes
    assert live.peak <= needed <= 1.5 * live.peak
    kept = found.gradients + found.optimizer + found.average
    assert live.bytes == pytest.approx(kept, rel=0.02)
    assert found.student == sum(
        p.nbytes for p in (*made.trainable_module.parameters(), *made.trainable_module.buffers())
    )


def test_activations_grow_with_the_images_of_a_piece_and_nothing_else_does() -> None:
    made = task(img_size=32)
    whole = estimate(made, DIGITS, TrainConfig(batch_size=64), WORLD)
    pieces = estimate(made, DIGITS, TrainConfig(batch_size=64, accumulation=4), WORLD)
    assert (whole.images, pieces.images) == (64, 16)
    assert pieces.activations < 0.35 * whole.activations
    assert replace(whole, activations=0, images=0, free=0) == replace(pieces, activations=0, images=0, free=0)
    half = estimate(made, DIGITS, TrainConfig(batch_size=64, amp="bfloat16"), WORLD)
    assert half.activations < 0.9 * whole.activations
    momentum = TrainConfig(batch_size=64, optimizer="sgd", optimizer_options={"momentum": 0.9})
    assert estimate(made, DIGITS, momentum, WORLD).optimizer == pytest.approx(whole.optimizer / 2, rel=0.01)


def test_the_estimate_leaves_the_task_as_it_was() -> None:
    made = task("test_resnet", "kd").eval()
    before = {key: value.clone() for key, value in made.state_dict().items()}
    random = rng_state()["torch"]
    estimate(made, DIGITS, TrainConfig(), WORLD)
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
    assert torch.equal(rng_state()["torch"], random)
    assert made.epoch is None and not made.training
    assert all(parameter.grad is None for parameter in made.parameters())
    # The measurement is not of nothing: in train() running statistics do move.
    made.train()(torch.randn(4, 3, 32, 32), torch.arange(4))
    assert any(not torch.equal(value, before[key]) for key, value in made.state_dict().items())


def test_live_tensors_counts_what_lives() -> None:
    layer = nn.Linear(10, 10, bias=False)
    with LiveTensors(layer) as live:
        x = torch.zeros(100, 10)
        assert live.bytes == 4000
        x.add_(1)
        _ = x[:50].view(-1)
        assert live.bytes == 4000
        y = layer(x)
        assert live.bytes == 8000
        del x, y, _
        layer.weight.detach().mul_(1)
    assert live.bytes == 0 and live.peak == 8000


def test_processes_share_the_memory_of_a_machine() -> None:
    one = Memory(10, 10, 10, 20, 0, 100, images=8, free=130)
    assert one.missing == 0 and one.total == 150
    assert replace(one, processes=2).missing == 130
    assert replace(one, free=None).problem(TrainConfig()) is None
    text = replace(one, processes=2).problem(TrainConfig(batch_size=16))
    assert text is not None and "in each of 2 processes" in text and "train.accumulation=4 would need" in text


def test_bytes_in_words() -> None:
    assert [in_bytes(n) for n in (512, 3 * 2**20, 12 * 2**30)] == ["0 KiB", "3.0 MiB", "12.0 GiB"]


def test_free_memory_of_this_machine() -> None:
    free = memory.free_memory(torch.device("cpu"))
    assert free is not None and 2**20 < free < 2**50


def test_files_that_a_container_keeps_in_memory_are_free(tmp_path: Path) -> None:
    """A container that has read its images has all of its memory taken, and gives most of it up."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("990\n")
    (tmp_path / "memory.stat").write_text(
        "anon 190\nfile 820\nshmem 20\ninactive_file 600\nactive_file 200\n"
    )
    assert memory._group_free(tmp_path) == 810
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_free(tmp_path) is None and memory._group_free(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("workers", "seconds"), [(0, 100 * 5.0), (1, 100 * 4.0), (2, 100 * 2.0), (8, 100 * 1.0)]
)
def test_workers_load_beside_a_step(workers: int, seconds: float) -> None:
    """Steps of 1 s and images of 4 s a batch: the slower one decides, and each worker loads a batch."""
    given = Recipe.model_validate(
        {"student": {"model": "test_vit"}, "data": {"workers": workers}, "out": "o"}
    )
    needed = Memory(0, 0, 0, 0, 0, 0, images=1)
    found = DryRun(given, "", (), "", needed, None, {"loss": 1.0}, 100, 1.0, 4.0, 1, "cpu")
    assert found.seconds == seconds
