"""The demo as a user runs it: whole, and killed again and again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.files import sha256

TRAININGS = ("teacher", "alone", "distilled")
CHECKPOINT_EVERY = 20


def start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vmkd_fx", "demo", "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(out: Path) -> tuple[str, str]:
    process = start(out)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return stdout, stderr


def log(out: Path, training: str) -> list[dict]:
    path = out / training / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(out: Path, training: str) -> int:
    return max((line["step"] for line in log(out, training)), default=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    pytest.importorskip("tensorrt_rtx", reason="the demo builds an engine: TensorRT-RTX is not installed")
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, finish(out)[0]


@pytest.mark.engine
def test_it_ends_in_one_table_and_a_whole_bundle(whole: tuple[Path, str]) -> None:
    out, printed = whole
    summary = (out / "summary.txt").read_text()
    assert summary.strip() in printed
    for row in ("teacher", "student alone", "student with STD, class head", "bundle in ONNX Runtime"):
        assert f"\n{row} " in summary
    assert "797 of 797 decisions as in torch" in summary
    assert (
        "\nengine                        built, not run" in summary
        or "\nengine                        run" in summary
    )
    assert "the teacher " in summary
    ledger = read_bundle(out / "bundle").manifest.ledger
    assert [step.name for step in ledger.steps][-2:] == ["onnx", "engine"]
    assert set(ledger.accuracy) == {"class", "mean", "dist"}
    engine = ledger.steps[-1]
    assert (engine.error is None) == (engine.checked == "built, not run")


@pytest.mark.slow
@pytest.mark.engine
def test_killed_at_any_moment_it_ends_in_the_same_weights(whole: tuple[Path, str], tmp_path: Path) -> None:
    """SIGKILL in each of the three trainings, then start again: the same files, bit for bit."""
    out = tmp_path / "out"
    stopped_at = {}
    for training, moment in zip(TRAININGS, (47, 33, 61), strict=True):
        process = start(out)
        while last_step(out, training) < moment and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        stopped_at[training] = last_step(out, training)

    _, stderr = finish(out)

    for training in TRAININGS:
        (resumed,) = (line["step"] for line in log(out, training) if line.get("event") == "resumed")
        assert 0 < resumed <= stopped_at[training] <= resumed + CHECKPOINT_EVERY
        steps = [line["step"] for line in log(out, training) if line.get("event") == "step"]
        assert steps == list(range(1, len(steps) + 1)), "every step stands in the log once"
        found, expected = (load_file(folder / training / "last.safetensors") for folder in (out, whole[0]))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert f"resumed from step {resumed}" in stderr
    assert sha256(out / "bundle" / "model.onnx") == sha256(whole[0] / "bundle" / "model.onnx")


@pytest.mark.slow
@pytest.mark.engine
def test_started_again_it_repeats_nothing(whole: tuple[Path, str]) -> None:
    out, printed = whole
    began = {training: (out / training / "last.safetensors").stat().st_mtime_ns for training in TRAININGS}
    again, _ = finish(out)
    assert {t: (out / t / "last.safetensors").stat().st_mtime_ns for t in TRAININGS} == began
    figures = [line for line in printed.splitlines() if " %" in line]
    assert figures
    assert [line for line in again.splitlines() if " %" in line] == figures
