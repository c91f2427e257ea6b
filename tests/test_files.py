"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from vmkd_fx.errors import OutputError
from vmkd_fx.files import make_folder, sha256, write_text, writing


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
