"""Writing and reading bundles, in both forms."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.deploy.tiny import ENGINE, FORMS, INFO, LABELS, LEDGER, PREPROCESS, STEP, tiny_bundle
from vmkd_fx import files
from vmkd_fx.deploy.bundle import is_bundle, open_bundle, read_bundle
from vmkd_fx.deploy.bundle_write import add_engine, record_verified, write_bundle
from vmkd_fx.deploy.manifest import Comparison, EngineInfo, Hazard, Verified
from vmkd_fx.deploy.runtime import load
from vmkd_fx.errors import BundleError, DataError, OutputError
from vmkd_fx.frames import Frames
from vmkd_fx.steps import Ledger, Step
from vmkd_fx.target import Profile, Target

OTHER = EngineInfo(Target("tensorrt-rtx", (86,)), INFO.profiles, INFO.built_with)


@pytest.fixture(params=FORMS)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A bundle with an engine that the test may spoil, as a folder and as one file."""
    return tiny_bundle(tmp_path / request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


def write_again(path: Path, source: Path) -> Path:
    onnx = source / "model.onnx"
    return write_bundle(path, onnx=onnx, preprocess=PREPROCESS, labels=(), ledger=Ledger(), name="again")


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_round_trip(bundle: Path) -> None:
    found = read_bundle(bundle)
    assert sorted(found.places) == ["model.onnx", ENGINE]
    assert found.packed == (bundle.suffix == ".vmkd")
    assert found.read(ENGINE) == b"an engine" and found.engines == {ENGINE: INFO}
    manifest = found.manifest
    assert (manifest.name, manifest.labels, manifest.preprocess) == ("tiny", LABELS, PREPROCESS)
    assert manifest.ledger == Ledger((*LEDGER.steps, STEP), {"class": 0.5})
    assert "vmkd-fx" in manifest.created_with and "torch" in manifest.created_with
    with pytest.raises(BundleError, match=r"holds no other\.engine; it holds model\.onnx"):
        found.read("other.engine")


def test_both_forms_compute_the_same(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((5, 3, 2, 2), dtype=np.float32)
    one, two = (load(tiny_bundle(tmp_path / form), device="cpu") for form in FORMS)
    np.testing.assert_array_equal(one(images), two(images))


def test_a_packed_bundle_is_a_tar_archive_of_the_folder(tmp_path: Path) -> None:
    folder, packed = (tiny_bundle(tmp_path / form) for form in FORMS)
    with tarfile.open(packed, "r:") as archive:
        assert archive.getnames()[0] == "manifest.json"
    shutil.unpack_archive(packed, tmp_path / "unpacked", "tar")
    assert names(tmp_path / "unpacked") == names(folder)
    for name in names(folder):
        assert (tmp_path / "unpacked" / name).read_bytes() == (folder / name).read_bytes()
    assert read_bundle(tmp_path / "unpacked").manifest == read_bundle(packed).manifest


@pytest.mark.parametrize("form", FORMS)
def test_same_contents_same_bytes(form: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    one, two = (tiny_bundle(path / form) for path in (tmp_path, tmp_path / "a"))
    both = [(one, two)] if one.is_file() else [(one / name, two / name) for name in names(one)]
    assert all(first.read_bytes() == second.read_bytes() for first, second in both)


def test_what_the_manifest_has_room_for(tmp_path: Path, folder: Path) -> None:
    frames = Frames("nchw", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    hazard = Hazard("name", "TensorRT", "10.16", "is wrong", "an issue", ("node_1",), "rewritten")
    path = write_bundle(
        tmp_path / "new.vmkd",
        onnx=folder / "model.onnx",
        preprocess=PREPROCESS,
        labels=LABELS,
        ledger=LEDGER,
        name="tiny",
        engines=[
            (folder / ENGINE, EngineInfo(INFO.target, (Profile(1, 1, 1), Profile(2, 8, 16)), "T", {"a": "b"}))
        ],
        precision="fp16",
        frames=frames,
        hazards=[hazard],
    )
    manifest = read_bundle(path).manifest
    assert (manifest.precision, manifest.frames, manifest.hazards) == ("fp16", frames, (hazard,))
    (info,) = read_bundle(path).engines.values()
    assert info.profiles == (Profile(1, 1, 1), Profile(2, 8, 16)) and info.options == {"a": "b"}


def test_the_sign_of_a_verification(bundle: Path) -> None:
    found = read_bundle(bundle)
    assert found.manifest.verified is None and not found.manifest.covered
    hashes = {name: entry.sha256 for name, entry in found.manifest.files.items()}
    verified = Verified(hashes, (Comparison("torch", "model.onnx", 8, 1e-6, 1e-5, 1.0),), {"torch": "2.15"})
    assert record_verified(found, verified).manifest.verified == verified
    assert read_bundle(bundle).manifest.covered
    add_engine(read_bundle(bundle), b"another", OTHER, STEP)
    assert read_bundle(bundle).manifest.verified == verified
    assert not read_bundle(bundle).manifest.covered, "the new engine was not compared with anything"


def test_an_engine_for_the_same_target_is_replaced(bundle: Path) -> None:
    add_engine(read_bundle(bundle), b"other", OTHER, Step("engine", f"{OTHER.target}; other"))
    for contents in (b"second", b"third"):
        again = Step("engine", f"{INFO.target}; {contents.decode()}")
        found = add_engine(read_bundle(bundle), contents, INFO, again)
        assert read_bundle(bundle) == found and len(found.engines) == 2
        (name,) = (name for name, info in found.engines.items() if info == INFO)
        assert found.read(name) == contents
        details = [step.detail for step in found.manifest.ledger.steps if step.name == "engine"]
        assert details == [f"{OTHER.target}; other", again.detail]
    if bundle.is_dir():
        assert len(names(bundle)) == 4


def test_engines_that_come_in_at_the_same_time(bundle: Path) -> None:
    """Both were built from the bundle as it was before either."""
    found = read_bundle(bundle)
    infos = [
        EngineInfo(Target("tensorrt-rtx", (sm,)), INFO.profiles, INFO.built_with) for sm in (80, 86, 89, 120)
    ]
    threads = [threading.Thread(target=add_engine, args=(found, b"e", info, STEP)) for info in infos]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_bundle(bundle).engines) == 5


def test_an_engine_for_another_graph_is_refused(folder: Path) -> None:
    before = read_bundle(folder)
    (folder.parent / "other").mkdir()
    shutil.copy(folder / "model.onnx", folder.parent / "other" / "model.onnx")
    with (folder.parent / "other" / "model.onnx").open("ab") as file:
        file.write(b"\x12\x01x")  # the name of a producer
    write_again(folder, folder.parent / "other")
    with pytest.raises(BundleError, match="replaced by a bundle with another graph"):
        add_engine(before, b"e", INFO, STEP)


def test_a_bundle_stays_whole_when_an_engine_cannot_be_written(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_bundle(bundle)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr(os, "fsync", full_disk)
        add_engine(before, b"another engine", INFO, STEP)
    assert read_bundle(bundle) == before
    assert names(bundle.parent) == [bundle.name]


def test_what_a_killed_writer_left_goes_with_the_next_change(folder: Path) -> None:
    """It neither stands in the way of a new bundle nor of a new engine."""
    left = [".manifest.json.abc.tmp", ".model.again.x.engine.abc.tmp", "model.again.tensorrt-rtx-sm80.engine"]
    for name in left:
        (folder / name).write_text("half of it")
    assert read_bundle(folder).engines == {ENGINE: INFO}
    add_engine(read_bundle(folder), b"other", OTHER, STEP)
    assert not {*left} & {*names(folder)} and len(read_bundle(folder).engines) == 2
    (folder / left[0]).write_text("half of it")
    write_again(folder, folder)
    assert names(folder) == ["manifest.json", "model.onnx"]


def test_a_label_that_nobody_could_read_back_is_refused(folder: Path, tmp_path: Path) -> None:
    for label, reason in (
        ("red \x1b[31m", r"labels\[0\] holds a character"),
        ("\udce9", "surrogates not allowed"),
    ):
        with pytest.raises(BundleError, match=reason):
            write_bundle(
                tmp_path / "new",
                onnx=folder / "model.onnx",
                preprocess=PREPROCESS,
                labels=[label],
                ledger=Ledger(),
                name="x",
            )
    assert names(tmp_path) == ["bundle"]


def test_what_is_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match=r"is not a bundle: it holds no file manifest\.json"):
            read_bundle(path)
    (tmp_path / "text").write_text("text")
    with pytest.raises(BundleError, match=r"is not a bundle: it does not begin with manifest\.json"):
        read_bundle(tmp_path / "text")
    assert not is_bundle(tmp_path / "text") and not is_bundle(tmp_path / "nowhere") and is_bundle(tmp_path)


def test_a_packed_bundle_has_any_name_once_it_is_there(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "bundle.vmkd").rename(tmp_path / "anything")
    (tmp_path / "link").symlink_to(path)
    assert is_bundle(path) and read_bundle(tmp_path / "link").path == path


def test_an_earlier_bundle_is_replaced(bundle: Path, tmp_path: Path) -> None:
    source = tiny_bundle(tmp_path / "source")
    write_again(bundle, source)
    assert read_bundle(bundle).manifest.name == "again" and not read_bundle(bundle).engines
    assert names(tmp_path) == sorted([bundle.name, "source"])


def test_a_bundle_is_replaced_by_one_of_its_own_file(folder: Path) -> None:
    write_again(folder, folder)
    assert read_bundle(folder).manifest.name == "again"
    assert names(folder) == ["manifest.json", "model.onnx"] and names(folder.parent) == ["bundle"]


def test_what_is_not_a_bundle_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "text.vmkd").write_text("my thesis")
    (tmp_path / "folder.vmkd").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("")
    for name, reason in (
        ("file", "it is a file, and that name asks for a folder"),
        ("folder.vmkd", "it is a folder, and that name asks for one file"),
        ("folder", "is not a bundle"),
        ("text.vmkd", "is not a bundle"),
        ("file/b", "cannot write"),
        ("file/b.vmkd", "cannot write"),
    ):
        with pytest.raises(OutputError, match=reason):
            write_again(tmp_path / name, folder)
    (folder / "notes.txt").write_text("")
    with pytest.raises(OutputError, match=r"also holds notes\.txt"):
        write_again(folder, folder)
    assert names(tmp_path) == ["bundle", "file", "folder", "folder.vmkd", "text.vmkd"]


def test_an_empty_folder_becomes_a_bundle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    read_bundle(write_again(tmp_path / "new", folder))


def test_a_missing_onnx_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no file"):
        write_again(tmp_path / "new", tmp_path)
    assert not names(tmp_path)


def test_a_full_disk_leaves_the_earlier_bundle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_bundle(tmp_path / "source")
    earlier = read_bundle(bundle)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr(os, "fsync", full_disk)
        write_again(bundle, source)
    assert read_bundle(bundle) == earlier
    assert names(tmp_path) == sorted([bundle.name, "source"])


def test_the_earlier_bundle_comes_back_when_the_new_one_cannot_take_its_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot exchange two folders, two renames do it, and the second can fail."""
    earlier = read_bundle(folder)
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        return full_disk() if self.suffix == ".new" else rename(self, target)  # type: ignore[return-value]

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr(files, "_exchange", lambda one, other: False)
        patch.setattr(Path, "rename", refuse_new)
        write_again(folder, folder)
    assert read_bundle(folder) == earlier
    assert names(folder.parent) == ["bundle"]


def test_a_packed_bundle_is_unpacked_for_its_owner_alone(bundle: Path) -> None:
    found = open_bundle(bundle)
    with found.unpacked() as folder:
        assert (folder / "model.onnx").read_bytes() == found.read("model.onnx")
        assert found.packed != (folder == bundle)
        if found.packed:
            assert folder.stat().st_mode & 0o077 == 0 and names(folder) == ["model.onnx"]
    assert folder.exists() != found.packed


def test_engines_say_what_they_were_built_for() -> None:
    for wrong in (
        {"target": Target("onnxruntime")},
        {"target": Target("tensorrt", ())},
        {"target": Target("tensorrt", (8600,))},
        {"profiles": ()},
    ):
        with pytest.raises(DataError, match="an engine"):
            EngineInfo(**{"target": INFO.target, "profiles": INFO.profiles, "built_with": "T", **wrong})
