"""The same model gives the same bundle, byte for byte, engines aside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys, torch, vmkd_fx as vx
from tests.models import small
from vmkd_fx.graph.verify import randomise_
torch.manual_seed(0)
labels = [f"class {index}" for index in range(10)]
vx.deploy(randomise_(small(sys.argv[1])), sys.argv[2], labels=labels)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), [("mixer", "bundle"), ("poolformer", "bundle.vmkd")])
def test_two_processes_write_the_same_bundle(family: str, form: str, tmp_path: Path) -> None:
    """Sets and dicts of strings come in another order in each of them."""
    paths = [tmp_path / seed / form for seed in ("1", "2")]
    for path in paths:
        environment = {**os.environ, "PYTHONHASHSEED": path.parent.name}
        subprocess.run([sys.executable, "-c", CODE, family, path], env=environment, check=True)
    one, two = ([path] if path.is_file() else sorted(path.iterdir()) for path in paths)
    assert [file.name for file in one] == [file.name for file in two]
    for first, second in zip(one, two, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
