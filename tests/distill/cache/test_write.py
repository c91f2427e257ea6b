"""Caches are the same whoever writes them, and go on where a killed process stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distill.cache.recipes import recipe, weights
from vmkd_fx.distill.cache import write
from vmkd_fx.distill.cache.folder import CacheFolder
from vmkd_fx.distill.cache.form import INDEX
from vmkd_fx.distill.cache.report import report
from vmkd_fx.distill.cache.shards import read_shard
from vmkd_fx.distill.cache.write import CacheSettings, Share, cache_teachers
from vmkd_fx.distill.recipe import Recipe
from vmkd_fx.errors import CacheError, RecipeError


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six files an epoch of 90 images, the last of them not full."""
    monkeypatch.setattr(write, "_MOST_ROWS", 16)


def cached(given: Recipe, out: Path, share: Share | None = None, **settings: Any) -> CacheFolder:
    (folder,) = cache_teachers(given, out, CacheSettings(**settings), share, progress=False)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def folder_of(out: Path) -> Path:
    return CacheFolder.open(out).path


def test_every_image_of_every_epoch_is_in_it_once(tmp_path: Path) -> None:
    folder = cached(recipe(tmp_path), tmp_path / "cache")
    assert folder.path == tmp_path / "cache" / "0-test_resnet"
    assert folder.shards == 6
    for epoch in range(3):
        shards = [read_shard(folder.file(epoch, n), folder.about(epoch, n)) for n in range(6)]
        assert [len(shard[INDEX]) for shard in shards] == [16] * 5 + [10]
        assert sorted(number for shard in shards for number in shard[INDEX]) == list(range(90))
    folder.check_epochs(3)
    assert "3 epochs of 90 images, all 10 classes in float16" in report(folder)
    assert "32 bytes an image and epoch" in report(folder)


def test_processes_share_the_work_and_write_the_same(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    cached(given, tmp_path / "one")
    for rank in (2, 0, 1):
        cached(given, tmp_path / "three", Share(rank=rank, size=3))
    cached(given, tmp_path / "later", epochs=range(2, 3))
    cached(given, tmp_path / "later", epochs=range(0, 2), batch_size=16)
    expected = contents(tmp_path / "one")
    assert len(expected) == 1 + 18
    assert contents(tmp_path / "three") == expected
    assert contents(tmp_path / "later") == expected


def test_of_an_odd_number_of_images_the_last_is_there_too(tmp_path: Path) -> None:
    folder = cached(recipe(tmp_path, data={"labelled": 35}), tmp_path / "cache", epochs=range(1))
    numbers = [n for s in range(3) for n in read_shard(folder.file(0, s), folder.about(0, s))[INDEX]]
    assert sorted(numbers) == list(range(35))
    # Where neighbours are mixed it has none, and no batch reaches it.
    mixed = recipe(tmp_path, data={"labelled": 33, "mixing": {"mixup": 0.8}})
    folder = cached(mixed, tmp_path / "mixed", epochs=range(1))
    numbers = [n for s in range(2) for n in read_shard(folder.file(0, s), folder.about(0, s))[INDEX]]
    assert len(set(numbers)) == len(numbers) == 32


def test_killed_at_any_moment_it_goes_on_to_the_same(tmp_path: Path) -> None:
    given = recipe(tmp_path, train={"epochs": 12})
    cached(given, tmp_path / "whole")
    expected, out, found = contents(tmp_path / "whole"), tmp_path / "killed", 0
    for more in (1, 9, 25):
        child = os.fork()
        if not child:
            try:
                cached(given, out)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 60
        while len(list(out.rglob("*.safetensors"))) < found + more and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it was done before it was killed"
        files = {path: data for path, data in contents(out).items() if not path.endswith(".tmp")}
        assert found + more <= len(files) < len(expected)
        assert files.items() <= expected.items()
        found = len(files) - 1
    left = [file for file in out.rglob("*.tmp")] or [folder_of(out) / "epoch-00003" / ".00001.x.tmp"]
    left[0].touch()
    cached(given, out)
    assert left[0].exists(), "it may be that of a running process"
    os.utime(left[0], (0, 0))
    cached(given, out)
    assert not left[0].exists()
    assert {path: data for path, data in contents(out).items() if not path.endswith(".tmp")} == expected


def test_a_damaged_file_is_made_anew_when_asked(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    folder = cached(given, tmp_path / "cache")
    expected = contents(folder.path)
    damaged = folder.file(1, 4)
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    folder.file(0, 2).write_bytes(folder.file(0, 3).read_bytes())
    with pytest.raises(CacheError, match=r"00004.safetensors is damaged \(wrong checksum\); run vmkd cache"):
        read_shard(damaged, folder.about(1, 4))
    with pytest.raises(CacheError, match=r"it was written as .*'shard': 3.*, not as .*'shard': 2"):
        read_shard(folder.file(0, 2), folder.about(0, 2))
    cached(given, tmp_path / "cache")
    assert contents(folder.path) != expected
    cached(given, tmp_path / "cache", check=True)
    assert contents(folder.path) == expected


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    cached(given, tmp_path / "cache", epochs=range(1))
    other = str(weights(tmp_path / "other.safetensors", seed=2))
    changes: dict[str, tuple[Recipe, dict[str, Any]]] = {
        r"teacher.weights was \w{12} and is \w{12}\.": (
            recipe(tmp_path, teachers=[{"model": "test_resnet", "checkpoint": other}]),
            {},
        ),
        "images.seed was 3 and is 4": (recipe(tmp_path, train={"seed": 4}), {}),
        "images.data.augment was True and is False": (recipe(tmp_path, data={"augment": False}), {}),
        "images.data.mixing was None and is .*cutmix": (recipe(tmp_path, data={"mixing": {}}), {}),
        "count was 90 and is 80": (recipe(tmp_path, data={"labelled": 80}), {}),
        "form.dtype was .float16. and is .float32.": (given, {"dtype": "float32"}),
        "form.top_k was None and is 3": (given, {"top_k": 3}),
    }
    for message, (changed, settings) in changes.items():
        with pytest.raises(CacheError, match=message):
            cached(changed, tmp_path / "cache", epochs=range(1), **settings)


def test_a_recipe_without_a_teacher_that_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no teacher that runs"):
        cached(recipe(tmp_path, teachers=[], method="none"), tmp_path / "cache")
    with pytest.raises(RecipeError, match="no teacher that runs"):
        cached(recipe(tmp_path, teachers=[{"cache": "somewhere"}]), tmp_path / "cache")


def test_a_broken_manifest_and_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"there is no cache .*vmkd cache recipe.yaml --out"):
        CacheFolder.open(tmp_path / "nothing")
    folder = cached(recipe(tmp_path), tmp_path / "cache", epochs=range(1))
    with pytest.raises(CacheError, match="for teacher 1, from 0; it holds 0-test_resnet: name one of these"):
        CacheFolder.open(tmp_path / "cache", place=1)
    manifest = folder.path / "cache.json"
    for text in ("", "[]", '{"format": 7}', manifest.read_text().replace('"rows"', '"lines"')):
        manifest.write_text(text)
        with pytest.raises(CacheError, match=r"cache.json is damaged or was written by something else"):
            CacheFolder.open(tmp_path / "cache")
