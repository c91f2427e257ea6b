"""Every name of the builders' API that is used is in the table, and all of the table is in the bindings."""

from __future__ import annotations

import ast
import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

import vmkd_fx.deploy
from tests.deploy.builder import bindings
from tests.deploy.conftest import needs_builder
from vmkd_fx.deploy.builder.names import NAMES, OLDEST, missing, version_of

DEPLOY = Path(vmkd_fx.deploy.__file__).parent
# The files that speak to a builder. What runs engines has a table and a test of its own.
ADAPTER = (
    DEPLOY / "tensorrt.py",
    DEPLOY / "precision" / "readback.py",
    *sorted((DEPLOY / "builder").glob("*.py")),
)

# Attributes of our own that the bindings happen to have too.
OURS = {"append", "clear", "kind", "read", "refittable", "update"}


def absent(kind: str, version: str, names: dict[str, list[str]]) -> tuple[str, ...]:
    """`missing` for bindings that were read in another process."""
    owners = {name: SimpleNamespace(**dict.fromkeys(items, "")) for name, items in names.items()}
    module = SimpleNamespace(__version__=version, **{**vars(owners[""]), **owners})
    return missing(module, kind)


def used(paths: tuple[Path, ...]) -> set[str]:
    """The attributes that the files read or write, and the methods that they override."""
    found: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.ClassDef) and any("trt." in ast.unparse(base) for base in node.bases):
                found |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


def bindings_folders() -> list[Path]:
    """Where TensorRT's bindings lie: VMKD_TENSORRT_BINDINGS names folders, or they are installed."""
    given = os.environ.get("VMKD_TENSORRT_BINDINGS", "")
    if given:
        return [Path(name) for name in given.split(os.pathsep)]
    spec = find_spec("tensorrt_bindings")
    return [Path(spec.origin).parent.parent] if spec and spec.origin else []


@needs_builder
@pytest.mark.engine
def test_the_installed_tensorrt_rtx_has_every_name() -> None:
    import tensorrt_rtx

    assert missing(tensorrt_rtx, "tensorrt-rtx") == ()


@needs_builder
@pytest.mark.engine
def test_every_name_that_is_used_is_in_the_table() -> None:
    import tensorrt_rtx as trt

    owners = [trt, *(item for item in vars(trt).values() if isinstance(item, type))]
    offered = {name for owner in owners for name in dir(owner) if not name.startswith("_")}
    listed = {name for entry in NAMES for name in (entry.owner, *entry.names)}
    unlisted = (used(ADAPTER) & offered) - listed - OURS
    assert not unlisted, f"used and not in the table of names: {sorted(unlisted)}"


def test_every_name_in_the_table_is_used() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in ADAPTER if path.name != "names.py")
    sms = {f"SM{number}" for number in (75, 80, 86, 89, 120, 121)}  # read by their number
    shown = {"IBuilderConfig", "IOptimizationProfile", "INetworkDefinition", "ITimingCache", "ParserError"}
    shown |= {"ILayer", "ITensor"}  # owners that the adapter never names
    idle = {name for entry in NAMES for name in entry.names if name not in text} - sms - shown
    assert not idle, f"in the table of names and not used: {sorted(idle)}"


@pytest.mark.skipif(not bindings.can_read(), reason="needs Linux, a C compiler and readelf")
@pytest.mark.skipif(
    not bindings_folders(), reason="TensorRT's bindings are not here (VMKD_TENSORRT_BINDINGS)"
)
def test_tensorrts_own_bindings_have_every_name() -> None:
    for folder in bindings_folders():
        version, names = bindings.read(folder)
        assert version_of(version) >= OLDEST["tensorrt"]
        assert absent("tensorrt", version, names) == (), version


def test_a_name_that_went_is_missing() -> None:
    names = {entry.owner: [] for entry in NAMES}
    for entry in NAMES:
        if "tensorrt" in entry.since:
            names[entry.owner] += entry.names
    assert absent("tensorrt", "10.3.0", names) == ()
    names["BuilderFlag"].remove("STRIP_PLAN")
    assert absent("tensorrt", "10.3.0", names) == ("BuilderFlag.STRIP_PLAN",)
    del names["OnnxParser"]
    names[""].remove("OnnxParser")
    assert "OnnxParser.parse_from_file" in absent("tensorrt", "11.4.0", names)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("10.3.0", (10, 3, 0)), ("10.14.1.48.post1", (10, 14, 1, 48)), ("1.7.1.116", (1, 7, 1, 116)), ("", ())],
)
def test_a_version_as_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert version_of(text) == numbers


def test_the_table_names_a_class_once_a_package() -> None:
    for kind in OLDEST:
        names = [(e.owner, name) for e in NAMES for name in e.names if kind in e.since]
        assert len(names) == len(set(names))
