"""Two processes that learn from a cache, beside one that asks the teacher itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.distill.cache.recipes import recipe
from tests.distill.processes import Group
from vmkd_fx.distill.cache.write import CacheSettings, Share, cache_teachers
from vmkd_fx.distill.recipe import Recipe
from vmkd_fx.distill.train import train

CHANGES: dict[str, Any] = {
    "data": {"labelled": 60, "mixing": {"mixup": 0.8}},
    "train": {"epochs": 2, "batch_size": 20, "evaluate_every": 2},
}


def learn(rank: int, size: int, content: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    train(Recipe.model_validate(content), progress=False)


def write(rank: int, size: int, content: dict[str, Any], out: str) -> None:
    whole = CacheSettings(top_k=None, dtype="float32")
    cache_teachers(Recipe.model_validate(content), out, whole, Share(None, rank, size), progress=False)


def losses(run: str) -> list[float]:
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    return [value for line in steps for key, value in line.items() if "loss" in key or "/" in key]


@pytest.mark.slow
def test_two_with_a_cache_that_two_wrote_have_the_losses_of_one_with_the_teacher(tmp_path: Path) -> None:
    live, out = recipe(tmp_path, **CHANGES), str(tmp_path / "cache")
    assert Group(tmp_path, 2, write, live.model_dump(mode="json"), out).wait() == [0, 0]
    cached = recipe(tmp_path, **CHANGES, teachers=[{"cache": out}], out=str(tmp_path / "two"))
    content = cached.model_dump(mode="json")
    assert Group(tmp_path, 2, learn, content).wait() == [0, 0]
    train(live, progress=False)
    expected, found = losses(live.out), losses(cached.out)
    assert len(expected) == len(found) == 6 * 4
    assert max(abs(one - other) for one, other in zip(expected, found, strict=True)) <= 1e-6
