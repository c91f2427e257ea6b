"""`vmkd build` on a board that has a bundle, numpy and an engine builder, and nothing else of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.conftest import needs_builder
from vmkd_fx.deploy.bundle import read_bundle

pytestmark = [pytest.mark.engine, needs_builder]

BLOCKED = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "onnxruntime",
    "cuda",
    "yaml",
    "tqdm",
)

BUILD = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from vmkd_fx.cli import main
status = main(["build", sys.argv[1], "--target", "tensorrt-rtx:sm86", "--profile", "1", "--profile", "2,4,8"])
brought = sorted(name for name in sys.modules if name.split(".")[0] in {BLOCKED!r})
assert not brought, brought
sys.exit(status)
"""


def test_a_bundle_and_a_builder_are_enough(bundle_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BUILD, bundle_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensorrt-rtx:sm86; TensorRT-RTX 1.")
    ((name, info),) = read_bundle(bundle_path).engines.items()
    assert name == "model.tensorrt-rtx-sm86.engine" and len(info.profiles) == 2


def test_what_is_wrong_is_said_there_too(bundle_path: Path) -> None:
    code = BUILD.replace('"--profile", "1"', '"--workspace", "1"')
    done = subprocess.run([sys.executable, "-c", code, bundle_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no kernel fits into the workspace that was allowed" in done.stderr
    assert "Traceback" not in done.stderr
    assert read_bundle(bundle_path).engines == {}
