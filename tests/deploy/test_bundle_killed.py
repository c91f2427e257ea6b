"""Writers that are killed at any moment leave the old bundle or the new one."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.deploy.tiny import FORMS, tiny_bundle
from vmkd_fx.deploy.bundle import read_bundle

# Writes two bundles in turns, one with more in it, and an engine into each, until it is killed.
WRITER = """
import sys
from pathlib import Path
from tests.deploy import tiny
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.bundle_write import add_engine, write_bundle
path, source = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
while True:
    for name in ("one", "two"):
        engines = [(source, tiny.INFO)] * (name == "two")
        write_bundle(path, onnx=source, preprocess=tiny.PREPROCESS, labels=(), ledger=tiny.LEDGER,
                     name=name, engines=engines)
        add_engine(read_bundle(path), name.encode() * 10000, tiny.INFO, tiny.STEP)
"""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_a_writer_is_killed(kills: int, form: str, tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / form)
    source = tmp_path / "source.onnx"
    source.write_bytes(read_bundle(path).read("model.onnx"))
    found = set()
    for seed in range(kills):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, path, source], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(random.Random(seed).uniform(0.0, 0.3))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        bundle = read_bundle(path)
        found.add((bundle.manifest.name, len(bundle.engines)))
    assert found <= {("tiny", 1), ("one", 0), ("one", 1), ("two", 1)}
