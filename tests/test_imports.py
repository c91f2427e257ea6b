"""Imports point one way, and the edge side stands on numpy and pillow alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vmkd_fx

PACKAGE = Path(vmkd_fx.__file__).parent
FLOORS = ("ground", "graph", "models", "passes", "distill", "deploy", "zoo", "top")
MAY_IMPORT = {
    "ground": {"ground"},
    "graph": {"ground", "graph"},
    "models": {"ground", "models"},
    "passes": {"ground", "graph", "models", "passes"},
    "distill": {"ground", "graph", "passes", "models", "distill"},
    "deploy": {"ground", "graph", "passes", "deploy"},
    "zoo": {"ground", "graph", "passes", "distill", "deploy", "zoo"},
    "top": set(FLOORS),
}
TOP = ("__init__", "__main__", "cli", "demo", "verbs")


def floor(module: str) -> str:
    """The floor of `vmkd_fx.<floor>....`"""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] in TOP:
        return "top"
    return parts[1] if parts[1] in FLOORS else "ground"


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] == "vmkd_fx"}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_point_downwards(path: Path) -> None:
    module = ".".join(("vmkd_fx", *path.relative_to(PACKAGE).with_suffix("").parts))
    own = floor(module)
    # The version alone comes from the top of the package.
    wrong = {name for name in imported(path) if name != "vmkd_fx" and floor(name) not in MAY_IMPORT[own]}
    assert not wrong, f"{module} stands on floor {own} and imports {sorted(wrong)}"


@pytest.mark.parametrize(
    "statement",
    [
        "import vmkd_fx",
        "import vmkd_fx; vmkd_fx.load",
        "import vmkd_fx; vmkd_fx.build",
        "import vmkd_fx; vmkd_fx.verify; vmkd_fx.bench",
        "import vmkd_fx.deploy.runtime",
        "import vmkd_fx.cli",
        "import vmkd_fx; callable(vmkd_fx.deploy) or exit(1)",
    ],
)
def test_the_edge_side_brings_neither_torch_nor_timm(statement: str) -> None:
    code = f"{statement}; import sys; print(sorted({{'torch', 'timm', 'onnx'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_verbs() -> None:
    verbs = {"trace", "anatomy", "tap", "wrap", "strip", "save", "lower", "ledger"}
    verbs |= {"export", "build", "deploy", "verify", "bench", "load"}
    assert verbs < set(dir(vmkd_fx))
    assert all(callable(getattr(vmkd_fx, verb)) for verb in verbs)
    with pytest.raises(AttributeError, match="no attribute 'deplyo'"):
        _ = vmkd_fx.deplyo


@pytest.mark.parametrize(
    ("verb", "extra"),
    [
        ("train x.yaml", "train"),
        ("inspect resnet18", "train"),
        ("sweep", "train"),
        ("deploy x.safetensors", "train"),
        ("demo", "train"),
    ],
)
def test_a_training_verb_without_its_extra_names_it(verb: str, extra: str) -> None:
    code = (
        "import sys; sys.modules.update(torch=None, timm=None); "
        f"from vmkd_fx.cli import main; sys.exit(main({verb.split()!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"pip install 'vmkd-fx[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
