"""Bundles damaged on the way, or made to do harm: refused with a reason, and nothing of them is used.

A flipped byte is found by hash and seal. Whoever means harm seals his manifest again, so what it says is
checked as well.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.deploy.tiny import ENGINE, FORMS, TEN_GB, edit_manifest, refuses, repack, tiny_bundle, tiny_graph
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.manifest import LARGEST_MANIFEST
from vmkd_fx.deploy.places import Held, sha256
from vmkd_fx.deploy.seal import seal_text, unseal
from vmkd_fx.errors import BundleError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle.vmkd")


def files(bundle: Path) -> list[Path]:
    return sorted(bundle.iterdir()) if bundle.is_dir() else [bundle]


def flips(bundle: Path, step: int) -> Iterator[tuple[str, int]]:
    """Flip each `step`-th byte of each file in turn, in one bit and in all; put it back afterwards."""
    for path in files(bundle):
        whole = path.read_bytes()
        for index in range(0, len(whole), step):
            for mask in (1 << index % 8, 0xFF):
                spoiled = bytearray(whole)
                spoiled[index] ^= mask
                path.write_bytes(spoiled)
                yield path.name, index
        path.write_bytes(whole)


def cuts(bundle: Path, step: int) -> Iterator[tuple[str, int]]:
    """Cut each file after each `step`-th byte, and lengthen it by one; put it back afterwards."""
    for path in files(bundle):
        whole = path.read_bytes()
        for length in (*range(0, len(whole), step), len(whole) + 1):
            path.write_bytes((whole + b"\0")[:length])
            yield path.name, length
        path.write_bytes(whole)


@pytest.mark.parametrize("damage", [flips, cuts])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_every_byte_counts(
    damage: Callable[[Path, int], Iterator[tuple[str, int]]], form: str, step: int, tmp_path: Path
) -> None:
    bundle = tiny_bundle(tmp_path / form)
    count = 0
    for name, index in damage(bundle, step):
        count += 1
        try:
            read_bundle(bundle)
        except BundleError as error:
            assert str(bundle) in str(error) and len(str(error)) < 1000
        else:
            pytest.fail(f"byte {index} of {name} does not count")
    assert count > 1500 // step
    read_bundle(bundle)


def test_files_that_changed_places(folder: Path) -> None:
    """The two files have the same length, so only their hashes tell them apart."""
    engine, graph = folder / ENGINE, folder / "model.onnx"
    raw = graph.read_bytes()
    edit_manifest(
        folder,
        lambda data: data["files"][ENGINE].update(bytes=len(raw), sha256=sha256(Held(bytes(len(raw))))),
    )
    engine.write_bytes(bytes(len(raw)))
    read_bundle(folder)
    engine.write_bytes(raw)
    graph.write_bytes(bytes(len(raw)))
    refuses(folder, "was changed: its SHA-256 is")


def test_a_manifest_of_another_bundle(folder: Path, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path / "other", engine=False)
    (other / "model.onnx").write_bytes((other / "model.onnx").read_bytes() + b"\x12\x01x")
    refuses(other, r"has \d+ bytes, the manifest says \d+: copy it again")
    shutil.copy(folder / "manifest.json", other / "manifest.json")
    refuses(other, r"is missing|has \d+ bytes")


@pytest.mark.parametrize("name", ["model.onnx", ENGINE, "manifest.json"])
def test_links_pipes_folders_and_what_is_missing(folder: Path, name: str) -> None:
    path, elsewhere = folder / name, folder.parent / "elsewhere"
    shutil.move(path, elsewhere)
    refuses(folder, "is missing")
    path.symlink_to(elsewhere)
    refuses(folder, "is a link")
    path.unlink()
    os.mkfifo(path)
    refuses(folder, "is no plain file")
    path.unlink()
    path.mkdir()
    refuses(folder, "is no plain file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(folder: Path) -> None:
    (folder / ENGINE).chmod(0)
    refuses(folder, "cannot be read: Permission denied")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../model.onnx",
        "a/b",
        "a\\b",
        "..",
        "",
        ".hidden",
        "manifest.json",
        "a\x00b",
        "a\n",
        "a" * 101,
    ],
)
def test_names_that_lead_elsewhere(folder: Path, name: str) -> None:
    edit_manifest(folder, lambda data: data["files"].update({name: data["files"][ENGINE]}))
    refuses(folder, "is not a plain file name|cannot be printed")


@pytest.mark.parametrize(
    "location", ["../outside", "/etc/passwd", "model.onnx", "*/_ORT_MEM_ADDR_/*", "weights"]
)
@pytest.mark.parametrize("form", FORMS)
def test_a_graph_with_weights_elsewhere(location: str, form: str, tmp_path: Path) -> None:
    """The manifest agrees with the graph; the graph itself leads out of the bundle."""
    graph = tiny_graph()
    tensor = graph.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.ClearField("raw_data")
    (tmp_path / "weights").write_bytes(bytes(96))
    (tmp_path / "outside").write_bytes(bytes(96))
    bundle = tiny_bundle(tmp_path / "bundle", engine=False)
    raw = graph.SerializeToString()
    (bundle / "model.onnx").write_bytes(raw)
    entry = {"bytes": len(raw), "sha256": sha256(Held(raw))}
    edit_manifest(bundle, lambda data: data["files"]["model.onnx"].update(entry))
    if form != "bundle":
        manifest = (bundle / "manifest.json").read_bytes()
        bundle = repack(tmp_path / form, ("manifest.json", manifest), ("model.onnx", raw))
    refuses(bundle, r"model\.onnx keeps weights in .*, and the bundle's own are none")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.update(format=2), "format 2, .* reads format 1"),
        (lambda data: data.update(format=True), "format True"),
        (lambda data: data.pop("format"), "format None"),
        (lambda data: data.pop("labels"), "'labels' is missing"),
        (lambda data: data.update(surprise=1), "'surprise' is unknown"),
        (lambda data: data.update(labels=["a", 1]), r"labels\[1\] must be a string, found 1"),
        (lambda data: data.update(labels={}), "labels must be a list"),
        (lambda data: data.update(name=None), "name must be a string, found None"),
        (
            lambda data: data.update(name="a\x1b[2J"),
            r"name holds a character that cannot be printed: 'a\\x1b",
        ),
        (lambda data: data.update(name="\ud800"), "cannot be printed"),
        (lambda data: data.update(files={}), r"holds no model\.onnx"),
        (lambda data: data.update(files=[]), "files must be an object"),
        (lambda data: data["files"].update({"b.onnx": data["files"]["model.onnx"]}), "or another graph"),
        (
            lambda data: data["files"].update(
                {"MODEL.engine": data["files"][ENGINE], "model.engine": data["files"][ENGINE]}
            ),
            "small and capital",
        ),
        (lambda data: data["files"]["model.onnx"].update(bytes=True), "bytes must be a whole number"),
        (lambda data: data["files"]["model.onnx"].update(bytes=1.5), "bytes must be a whole number"),
        (lambda data: data["files"]["model.onnx"].update(bytes=-1), "'bytes' or 'sha256'"),
        (lambda data: data["files"]["model.onnx"].update(bytes=2**70), "below 2"),
        (lambda data: data["files"]["model.onnx"].update(sha256="0" * 63), "'bytes' or 'sha256'"),
        (lambda data: data["files"]["model.onnx"].update(kind="pickle"), "the kind 'pickle'"),
        (lambda data: data["files"]["model.onnx"].update(kind="engine"), "an engine, and nothing else"),
        (lambda data: data["files"][ENGINE]["engine"]["target"].update(kind="tvm"), "not one of tensorrt"),
        (lambda data: data["files"][ENGINE]["engine"].update(profiles=[]), "without an optimisation profile"),
        (lambda data: data["files"][ENGINE]["engine"]["profiles"][0].update(best=9), "optimisation profile"),
        (lambda data: data["files"][ENGINE]["engine"]["target"].update(compute_capabilities=[]), "as in"),
        (lambda data: data["preprocess"].update(crop_pct=-1), "crop_pct"),
        (lambda data: data["preprocess"].update(input_size=[3, 2]), "a list of 3"),
        (lambda data: data["preprocess"].update(mean=[float("nan")] * 3), "NaN is no JSON number"),
        (lambda data: data["ledger"].pop("accuracy"), r"ledger: 'accuracy' is missing"),
        (lambda data: data["ledger"]["steps"][0].update(surprise=1), r"steps\[0\]: 'surprise' is unknown"),
        (lambda data: data["ledger"]["steps"][0].update(error="small"), "a finite number, found 'small'"),
        (lambda data: data["ledger"]["steps"][0].update(error=10**400), "a finite number"),
        (lambda data: data.update(precision="fp7"), "precision 'fp7' is not one of"),
        (lambda data: data.update(frames={"layout": "nhcw", "mean": None, "std": None}), "layout of frames"),
        (lambda data: data.update(verified=True), "verified must be an object"),
    ],
)
def test_a_manifest_that_says_what_it_may_not(folder: Path, change: Any, reason: str) -> None:
    edit_manifest(folder, change)
    refuses(folder, reason)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"format": 1, "na',
        b"[" * 100_000,
        b"[]",
        b"1",
        b"\xff\xfe",
        b'{\n "sha256": "',
        b'{\n "sha256": "0"}',
    ],
)
def test_a_manifest_that_is_not_sealed(folder: Path, text: bytes) -> None:
    (folder / "manifest.json").write_bytes(text)
    refuses(folder, r"manifest\.json: it does not begin with its own SHA-256")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"a": 1, "a": 2}', "names a key twice"),
        ("1" * 5000, "not valid JSON|whole"),
    ],
    ids=["deep", "twice", "long"],
)
def test_a_sealed_manifest_that_no_parser_should_see_unprepared(
    folder: Path, value: str, reason: str
) -> None:
    """Deep nesting, a key twice, a number of thousands of digits: sealed as an attacker would."""
    path = folder / "manifest.json"
    text = json.dumps({"sha256": "", **unseal(path.read_bytes()), "name": "here"}, indent=1)
    path.write_bytes(seal_text(text.replace('"here"', value)))
    refuses(folder, reason)


def test_a_huge_manifest_is_refused_unread(folder: Path) -> None:
    with (folder / "manifest.json").open("ab") as file:
        file.truncate(TEN_GB)
    refuses(folder, f"larger than the {LARGEST_MANIFEST:,} bytes")


@pytest.mark.parametrize("name", ["model.onnx", ENGINE])
def test_ten_gigabytes_that_are_not_there(folder: Path, name: str) -> None:
    edit_manifest(folder, lambda data: data["files"][name].update(bytes=TEN_GB))
    refuses(folder, "has .* bytes, the manifest says 10,000,000,000")


def test_a_graph_that_is_larger_than_any_graph_is_refused_unread(folder: Path) -> None:
    """The file is sparse: reading it would take ten gigabytes of memory."""
    with (folder / "model.onnx").open("ab") as file:
        file.truncate(TEN_GB)
    edit_manifest(folder, lambda data: data["files"]["model.onnx"].update(bytes=TEN_GB))
    refuses(folder, "an ONNX graph has 2,147,483,647 bytes at most")


def test_reading_writes_nothing(folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it unpickle, compile or start anything."""
    import sys

    seen: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        watched = event in (
            "exec",
            "compile",
            "pickle.find_class",
            "subprocess.Popen",
            "os.system",
            "os.exec",
        )
        if watching and (watched or (event == "open" and _writes(arguments))):
            seen.append(f"{event} {arguments}")

    watching = False
    sys.addaudithook(watch)
    for bundle in (folder, packed):
        read_bundle(bundle)
        watching = True
        read_bundle(bundle)
        watching = False
    assert not seen


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool((isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR))
