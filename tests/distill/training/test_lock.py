from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest

from vmkd_fx.distill.training.lock import NAME, locked
from vmkd_fx.errors import OutputError


def hold(folder: Path, held: object, go_on: object) -> None:
    with locked(folder):
        held.set()  # type: ignore[attr-defined]
        go_on.wait(60)  # type: ignore[attr-defined]


def test_another_process_is_named_and_its_end_frees_the_folder(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")
    held, go_on = forked.Event(), forked.Event()
    other = forked.Process(target=hold, args=(tmp_path, held, go_on))
    other.start()
    assert held.wait(60)
    message = rf"another training is in that folder, process {other.pid} on {socket.gethostname()}"
    with pytest.raises(OutputError, match=message), locked(tmp_path):
        pass
    other.kill()
    other.join()
    assert (tmp_path / NAME).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / NAME).exists()


def test_the_same_process(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(OutputError, match="another training of this process"), locked(tmp_path):
            pass
        with locked_elsewhere(tmp_path / "elsewhere"):
            pass
    with locked(tmp_path):
        pass


def locked_elsewhere(folder: Path) -> object:
    folder.mkdir()
    return locked(folder)


def test_a_child_does_not_inherit_it(tmp_path: Path) -> None:
    """The processes that load images are forked, and may outlive a training that is killed."""
    with locked(tmp_path):
        pid = os.fork()
        if pid == 0:
            try:
                with locked(tmp_path):
                    os._exit(1)
            except OutputError:
                os._exit(0)  # this module's own list was inherited
    assert os.waitpid(pid, 0)[1] == 0
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"pid": 999999999, "host": "elsewhere"}'])
def test_what_a_dead_process_left(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*\.lock"), locked(tmp_path):
        pass
