"""Progress of a build, and Ctrl-C in the middle of one."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.deploy.conftest import needs_builder
from vmkd_fx.deploy.tensorrt import Network
from vmkd_fx.steps import Step
from vmkd_fx.target import Profile

pytestmark = [pytest.mark.engine, needs_builder]

# Presses Ctrl-C at the first sign of progress, and says how long the build went on.
PRESSED = """
import os, signal, sys, threading, time
from pathlib import Path
from vmkd_fx.deploy.tensorrt import Network
from vmkd_fx.target import Profile

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
network = Network("tensorrt-rtx", Path(sys.argv[1]))
threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGINT)).start()
started = time.monotonic()
try:
    network.build([Profile(n, n, n) for n in range(1, 41)], (86, 89, 120), progress=False)
except KeyboardInterrupt:
    print(f"stopped {time.monotonic() - started:.2f}")
else:
    print(f"built {time.monotonic() - started:.2f}")
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.set_wakeup_fd(-1))
"""


def test_ctrl_c_stops_the_builder(exported: tuple[Path, Step]) -> None:
    def run(after: float) -> tuple[str, float, str]:
        command = [sys.executable, "-c", PRESSED, exported[0], str(after)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        first, handler = done.stdout.splitlines()
        word, seconds = first.split()
        return word, float(seconds), handler

    word, seconds, handler = run(0.3)
    assert word == "stopped" and handler == "True -1"
    assert seconds < 30  # forty profiles for three GPUs take minutes


def test_lines_where_there_is_no_terminal(
    exported: tuple[Path, Step], capfd: pytest.CaptureFixture[str]
) -> None:
    Network("tensorrt-rtx", exported[0]).build(Profile(), (86,), progress=True)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "building for TensorRT-RTX: 0/6, 0 s, started"
    assert lines[-1].startswith("building for TensorRT-RTX: 6/6, ") and lines[-1].endswith("done")


def test_a_build_beside_the_main_thread(exported: tuple[Path, Step]) -> None:
    engines: list[bytes] = []
    network = Network("tensorrt-rtx", exported[0])
    thread = threading.Thread(target=lambda: engines.append(network.build(Profile(), (86,), progress=False)))
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGINT) is before
        time.sleep(0.01)
    assert len(engines[0]) > 1000
