"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import threading
from pathlib import Path

import pytest

from vmkd_fx import files
from vmkd_fx.errors import OutputError
from vmkd_fx.files import appearing, check_writable, drafting, make_folder, sha256, write_text, writing


def test_a_file_appears_under_its_name_with_the_usual_rights(tmp_path: Path) -> None:
    target = tmp_path / "new" / "notes.txt"
    write_text(target, "größer")
    usual = tmp_path / "usual"
    usual.touch()
    assert target.read_text(encoding="utf-8") == "größer"
    assert target.stat().st_mode == usual.stat().st_mode
    assert [path.name for path in target.parent.iterdir()] == ["notes.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), writing(target) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"
    target.write_text("old")
    full = OSError(errno.ENOSPC, "No space left on device")
    message = r"cannot write .*notes\.txt: No space left on device"
    with pytest.raises(OutputError, match=message), writing(target):
        raise full
    assert target.read_text() == "old"


def test_a_place_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*(Not a directory|File exists)"):
        write_text(tmp_path / "file" / "x", "")
    with pytest.raises(OutputError, match=r"cannot write .*(Not a directory|File exists)"):
        make_folder(tmp_path / "file" / "x")


def test_a_place_is_refused_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deeper" / "file")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*file/below/it: .*/file is no folder"):
        check_writable(tmp_path / "file" / "below" / "it")


def test_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9999
    (tmp_path / "x").write_bytes(data)
    assert sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OutputError, match="it is there and is no regular file"):
            write_text(tmp_path / name, "x")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for text in ("one", "two"):
        with appearing(tmp_path / "folder") as folder:
            (folder / text).touch()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["two"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems exchange folders in two steps")
def test_nobody_ever_finds_no_folder(tmp_path: Path) -> None:
    target, stop, missing = tmp_path / "folder", threading.Event(), []
    target.mkdir()

    def watch() -> None:
        while not stop.is_set():
            if not target.is_dir():
                missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(200):
        with appearing(target):
            pass
    stop.set()
    watcher.join()
    assert not missing


def test_files_that_belong_together_appear_together(tmp_path: Path) -> None:
    target = tmp_path / "new" / "graph"
    with drafting(target) as folder:
        (folder / "graph").write_text("graph")
        (folder / "graph.data").write_text("weights")
        assert not target.exists()
    assert sorted(path.name for path in target.parent.iterdir()) == ["graph", "graph.data"]
    with pytest.raises(ZeroDivisionError), drafting(target) as folder:
        (folder / "graph").write_text("half")
        _ = 1 / 0
    assert target.read_text() == "graph"
    assert sorted(path.name for path in target.parent.iterdir()) == ["graph", "graph.data"]
    with pytest.raises(OutputError, match="it is there and is no regular file"), drafting(tmp_path / "new"):
        pass
