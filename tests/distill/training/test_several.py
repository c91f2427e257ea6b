from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distill.processes import Group
from tests.distill.run_folders import WEIGHTS, determined, lines
from tests.distill.training.several import train, whole_and_broken
from tests.slow import rest_slow
from vmkd_fx.distill.training.world import World
from vmkd_fx.errors import RecipeError
from vmkd_fx.files import sha256

# Ten steps in float32 from sums in another order.
TOLERANCE = 1e-5


def difference(one: Path, other: Path) -> float:
    """Norm of the difference of two weights files over the norm of what training changed, about."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    joined: list[Tensor] = [torch.cat([state[key].flatten() for key in first]) for state in (first, second)]
    return float((joined[0] - joined[1]).norm() / joined[0].norm())


def figures(out: Path) -> list[float]:
    """The loss and the norm of the gradient at every step."""
    return [line[key] for line in lines(out, "step") for key in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    train(out, World(torch.device("cpu")))
    return out


@pytest.mark.parametrize("distributed", rest_slow(["ddp", "fsdp"]))
def test_two_processes_train_as_one_and_go_on_exactly(tmp_path: Path, alone: Path, distributed: str) -> None:
    assert Group(tmp_path, 2, whole_and_broken, tmp_path, distributed).wait() == [0, 0]
    same, whole, broken = (tmp_path / name for name in ("same", "whole", "broken"))
    for file in WEIGHTS:
        assert difference(alone / file, same / file) < TOLERANCE
        assert difference(alone / file, whole / file) > 10 * TOLERANCE
        assert sha256(whole / file) == sha256(broken / file)
    assert figures(same) == pytest.approx(figures(alone), rel=1e-4)
    assert [line["step"] for line in lines(broken, "resumed")] == [3]
    assert determined(whole) == determined(broken)


def test_pieces_of_a_batch_are_the_batch(tmp_path: Path, alone: Path) -> None:
    train(tmp_path, World(torch.device("cpu")), accumulation=4)
    assert difference(alone / "last.safetensors", tmp_path / "last.safetensors") < TOLERANCE
    assert figures(tmp_path) == pytest.approx(figures(alone), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"batch_size": 18}, 4, "a batch of 18 images is shared out to 4 processes.*multiple of 4"),
        ({"batch_size": 16, "accumulation": 4}, 3, "multiple of 12"),
        ({"batch_size": 512, "accumulation": 32}, 1, "multiple of 32, and the data set has 80 images"),
        ({"sync_batchnorm": True}, 2, "SyncBatchNorm works on GPUs alone"),
        ({"distributed": "fsdp", "clip_mode": "agc"}, 1, "clip by norm"),
        ({"distributed": "fsdp", "amp": "float16"}, 1, "bfloat16"),
        ({"optimizer_options": {"betaz": [0.9, 0.99]}}, 1, r"'sgd' refuses.*betaz"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path, settings: dict[str, Any], size: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One process that believes in others: every refusal comes before they talk.
    monkeypatch.setattr(World, "from_first", lambda self, work: work())
    with pytest.raises(RecipeError, match=message):
        train(tmp_path, World(torch.device("cpu"), 0, size), **settings)
