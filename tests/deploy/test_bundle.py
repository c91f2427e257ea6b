from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import LABELS
from vmkd_fx.deploy.bundle import add_engine, read_bundle, write_bundle
from vmkd_fx.deploy.manifest import LARGEST_MANIFEST, EngineInfo
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.errors import BundleError, OutputError
from vmkd_fx.steps import Ledger, Step
from vmkd_fx.target import Profile, Target

INFO = EngineInfo(Target("tensorrt-rtx", (86, 89)), Profile(1, 2, 4), "TensorRT-RTX 1.7.1.116")
STEP = Step("engine", f"{INFO.target}; first", checked="built, not run")
ENGINE = "model.tensorrt-rtx-sm86-sm89.engine"


@pytest.fixture
def with_engine(bundle_path: Path) -> Path:
    add_engine(read_bundle(bundle_path), b"an engine", INFO, STEP)
    return bundle_path


def write_again(path: Path, source: Path, preprocess: Preprocess) -> Path:
    onnx = source / "model.onnx"
    return write_bundle(path, onnx=onnx, preprocess=preprocess, labels=(), ledger=Ledger(), name="again")


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def edit_manifest(bundle: Path, change: Any) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    change(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_round_trip(with_engine: Path, preprocess: Preprocess, exported: tuple[Path, Step]) -> None:
    bundle = read_bundle(with_engine)
    assert names(with_engine) == ["manifest.json", "model.onnx", ENGINE]
    assert bundle.onnx.read_bytes() == exported[0].read_bytes()
    assert bundle.engines == {with_engine / ENGINE: INFO}
    manifest = bundle.manifest
    assert (manifest.name, manifest.labels, manifest.preprocess) == ("mixer", LABELS, preprocess)
    assert manifest.ledger == Ledger((exported[1], STEP), {"class": 0.5})
    assert "vmkd-fx" in manifest.created_with and "torch" in manifest.created_with


def test_same_contents_same_manifest(bundle_path: Path, preprocess: Preprocess, tmp_path: Path) -> None:
    one, two = (write_again(tmp_path / name, bundle_path, preprocess) for name in ("one", "two"))
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()


def test_engines_given_at_once(bundle_path: Path, preprocess: Preprocess, tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(b"an engine")
    path = write_bundle(
        tmp_path / "new",
        onnx=bundle_path / "model.onnx",
        preprocess=preprocess,
        labels=LABELS,
        ledger=Ledger(),
        name="mixer",
        engines=[(tmp_path / "e", INFO)],
    )
    assert read_bundle(path).engines == {path / ENGINE: INFO}


def test_an_engine_for_the_same_target_is_replaced(with_engine: Path) -> None:
    again = Step("engine", f"{INFO.target}; second")
    other = EngineInfo(Target("tensorrt-rtx", (86,)), INFO.profile, INFO.built_with)
    add_engine(read_bundle(with_engine), b"other", other, Step("engine", f"{other.target}; other"))
    add_engine(read_bundle(with_engine), b"another engine", INFO, again)
    bundle = read_bundle(with_engine)
    assert len(bundle.engines) == 2
    assert (with_engine / ENGINE).read_bytes() == b"another engine"
    details = [step.detail for step in bundle.manifest.ledger.steps if step.name == "engine"]
    assert details == [f"{other.target}; other", f"{INFO.target}; second"]


def test_a_bundle_stays_whole_when_an_engine_cannot_be_written(
    with_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(with_engine)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr(os, "fsync", full_disk)
        add_engine(bundle, b"another engine", INFO, STEP)
    assert read_bundle(with_engine) == bundle
    assert len(names(with_engine)) == 3


@pytest.mark.parametrize("name", ["model.onnx", ENGINE])
def test_a_flipped_byte_is_named_with_both_hashes(with_engine: Path, name: str) -> None:
    data = bytearray((with_engine / name).read_bytes())
    data[len(data) // 2] ^= 1
    (with_engine / name).write_bytes(data)
    recorded = json.loads((with_engine / "manifest.json").read_text())["files"][name]["sha256"]
    with pytest.raises(BundleError, match=rf"{name} was changed: its SHA-256 is \w{{12}}….*{recorded[:12]}"):
        read_bundle(with_engine)


@pytest.mark.parametrize("name", ["model.onnx", ENGINE])
def test_missing_longer_and_linked_files(with_engine: Path, name: str) -> None:
    path = with_engine / name
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=f"has {size + 1:,} bytes, the manifest says {size:,}"):
        read_bundle(with_engine)
    elsewhere = with_engine.parent / "elsewhere"
    shutil.move(path, elsewhere)
    with pytest.raises(BundleError, match=f"{name} is missing"):
        read_bundle(with_engine)
    path.symlink_to(elsewhere)
    with pytest.raises(BundleError, match=f"{name} is a link"):
        read_bundle(with_engine)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../model.onnx", "a/b", "a\\b", "..", "", ".hidden", "manifest.json", "a\x00b", "a\n"],
)
def test_names_that_lead_elsewhere(bundle_path: Path, name: str) -> None:
    edit_manifest(bundle_path, lambda data: data["files"].update({name: data["files"]["model.onnx"]}))
    with pytest.raises(BundleError, match="is not a plain file name"):
        read_bundle(bundle_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.update(format=2), "format 2 .* reads format 1"),
        (lambda data: data.pop("labels"), "'labels' is missing"),
        (lambda data: data.update(labels=["a", 1]), "'labels' must be a list of str"),
        (lambda data: data.update(name=None), "'name' must be str"),
        (lambda data: data.update(files={}), r"holds no model\.onnx"),
        (lambda data: data["files"]["model.onnx"].update(bytes=True), "'bytes' must be int"),
        (lambda data: data["files"]["model.onnx"].update(bytes=-1), "'bytes' or 'sha256'"),
        (lambda data: data["files"]["model.onnx"].update(sha256="0" * 63), "'bytes' or 'sha256'"),
        (lambda data: data["files"]["model.onnx"].update(kind="pickle"), "neither 'onnx' nor 'engine'"),
        (lambda data: data["files"][ENGINE].update(runtime="tvm"), "not one of tensorrt"),
        (lambda data: data["files"][ENGINE].update(profile=[4, 2, 1]), "optimisation profile"),
        (lambda data: data["files"][ENGINE].update(sm=[]), "'sm' must hold"),
        (lambda data: data["preprocess"].update(crop_pct=-1), "crop_pct"),
        (lambda data: data["ledger"].pop("accuracy"), "'ledger' cannot be read"),
        (lambda data: data["ledger"]["steps"][0].update(surprise=1), "'ledger' cannot be read"),
        (lambda data: data["ledger"]["steps"][0].update(error="small"), "wrong type"),
    ],
)
def test_a_manifest_that_says_what_it_may_not(with_engine: Path, change: Any, reason: str) -> None:
    edit_manifest(with_engine, change)
    with pytest.raises(BundleError, match=reason):
        read_bundle(with_engine)


@pytest.mark.parametrize(
    "text", ["", '{"format": 1, "na', "[" * 100_000, '{"format": NaN}', "\udce9", "[]", "1"]
)
def test_a_manifest_that_is_no_json_object(bundle_path: Path, text: str) -> None:
    (bundle_path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_bundle(bundle_path)


def test_a_huge_manifest_is_refused_unread(bundle_path: Path) -> None:
    with (bundle_path / "manifest.json").open("ab") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(BundleError, match=f"larger than the {LARGEST_MANIFEST:,} bytes"):
        read_bundle(bundle_path)


def test_a_linked_manifest_is_refused(bundle_path: Path) -> None:
    manifest = bundle_path / "manifest.json"
    manifest.rename(bundle_path.parent / "elsewhere.json")
    manifest.symlink_to(bundle_path.parent / "elsewhere.json")
    with pytest.raises(BundleError, match="is not a bundle"):
        read_bundle(bundle_path)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match=r"is not a bundle: it holds no file manifest\.json"):
            read_bundle(path)


def test_an_earlier_bundle_is_replaced(with_engine: Path, preprocess: Preprocess) -> None:
    """Even when the new one is made from the file of the old one."""
    write_again(with_engine, with_engine, preprocess)
    assert read_bundle(with_engine).manifest.name == "again"
    assert names(with_engine) == ["manifest.json", "model.onnx"]
    assert names(with_engine.parent) == ["bundle"]


def test_what_is_not_a_bundle_is_not_replaced(
    bundle_path: Path, preprocess: Preprocess, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("")
    for name, reason in (("file", "it is a file"), ("folder", "is not a bundle"), ("file/b", "cannot write")):
        with pytest.raises(OutputError, match=reason):
            write_again(tmp_path / name, bundle_path, preprocess)
    (bundle_path / "notes.txt").write_text("")
    with pytest.raises(OutputError, match=r"also holds notes\.txt"):
        write_again(bundle_path, bundle_path, preprocess)
    assert names(tmp_path) == ["bundle", "file", "folder"]


def test_an_empty_folder_becomes_a_bundle(bundle_path: Path, preprocess: Preprocess, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    read_bundle(write_again(tmp_path / "new", bundle_path, preprocess))


def test_a_missing_onnx_file(preprocess: Preprocess, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no file"):
        write_again(tmp_path / "new", tmp_path, preprocess)
    assert not names(tmp_path)


@pytest.mark.parametrize("failing", ["fsync", "copy"])
def test_a_full_disk_leaves_the_earlier_bundle(
    failing: str, bundle_path: Path, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = read_bundle(bundle_path)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr(os, "fsync", full_disk) if failing == "fsync" else patch.setattr(
            shutil, "copyfile", full_disk
        )
        write_again(bundle_path, bundle_path, preprocess)
    assert read_bundle(bundle_path) == earlier
    assert names(bundle_path.parent) == ["bundle"]


def test_the_earlier_bundle_comes_back_when_the_new_one_cannot_take_its_place(
    bundle_path: Path, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = read_bundle(bundle_path)
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        return full_disk() if self.suffix == ".new" else rename(self, target)  # type: ignore[return-value]

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr(Path, "rename", refuse_new)
        write_again(bundle_path, bundle_path, preprocess)
    assert read_bundle(bundle_path) == earlier
    assert names(bundle_path.parent) == ["bundle"]
