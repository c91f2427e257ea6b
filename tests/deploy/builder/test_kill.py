"""A build that is killed leaves the bundle as it was, or with the new engine, and never anything else."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.deploy.builder.writer import INFO, contents, step
from tests.deploy.conftest import needs_builder
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.bundle_write import add_engine
from vmkd_fx.deploy.engine import build
from vmkd_fx.deploy.manifest import MANIFEST

TARGET = "tensorrt-rtx:sm86"
BUILD = (
    "-c",
    "import sys; from vmkd_fx.deploy.engine import build; print('ready', flush=True); "
    f"build(sys.argv[1], target={TARGET!r}, progress=False)",
)
WRITE = ("-m", "tests.deploy.builder.writer")


def killed(code: tuple[str, str], bundle: Path, after: float) -> None:
    """Run `code` and kill it `after` seconds after it is ready."""
    command = [sys.executable, *code, str(bundle)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, cwd=Path(__file__).parents[3], **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(after)
        process.kill()


def state(bundle: Path) -> tuple[bytes, tuple[bytes, ...]]:
    """What the bundle says and holds; raises where the two disagree."""
    opened = read_bundle(bundle)
    return (bundle / MANIFEST).read_bytes(), tuple(opened.read(name) for name in opened.engines)


def check_builds(bundle: Path, times: int) -> None:
    started = time.monotonic()
    build(bundle, target=TARGET, progress=False)
    seconds = time.monotonic() - started
    before, chance = state(bundle), random.Random(0)
    for _ in range(times):
        killed(BUILD, bundle, chance.uniform(0, 1.5 * seconds))
        now = state(bundle)
        assert len(now[1]) == 1
        assert now == before or now[0] != before[0]  # a new engine, and a manifest that says so
        before = now
    build(bundle, target=TARGET, progress=False)
    assert {item.name for item in bundle.iterdir()} == {MANIFEST, *read_bundle(bundle).manifest.files}


def check_writes(bundle: Path, times: int) -> set[str]:
    add_engine(read_bundle(bundle), contents("a"), INFO, step("a"))
    chance, seen = random.Random(0), set()
    for _ in range(times):
        killed(WRITE, bundle, chance.uniform(0, 0.3))
        opened = read_bundle(bundle)
        ((name, _),) = opened.engines.items()
        engine = opened.read(name)
        letter = engine[:1].decode()
        assert engine == contents(letter)
        assert [s.detail for s in opened.manifest.ledger.steps if s.name == "engine"] == [step(letter).detail]
        seen.add(letter)
    add_engine(read_bundle(bundle), contents("a"), INFO, step("a"))
    assert {item.name for item in bundle.iterdir()} == {MANIFEST, *read_bundle(bundle).manifest.files}
    return seen


@needs_builder
@pytest.mark.engine
def test_a_killed_build_leaves_the_old_bundle_or_the_new_one(bundle_path: Path) -> None:
    check_builds(bundle_path, 2)


def test_a_killed_write_leaves_the_old_bundle_or_the_new_one(bundle_path: Path) -> None:
    check_writes(bundle_path, 3)


@needs_builder
@pytest.mark.engine
@pytest.mark.slow
def test_fifty_killed_builds(bundle_path: Path) -> None:
    check_builds(bundle_path, 50)


@pytest.mark.slow
def test_fifty_killed_writes(bundle_path: Path) -> None:
    assert check_writes(bundle_path, 50) == {"a", "b"}
