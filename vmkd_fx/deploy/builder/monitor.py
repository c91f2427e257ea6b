"""How far the builder is, in the project's progress bar, and Ctrl-C while it works.

The library calls back with nested phases. The outermost one is the bar, the innermost one stands beside it.
A callback may come from any thread, and an exception in it would tear the process down, so Ctrl-C is taken
from the file descriptor that Python writes signals to, and answered by telling the builder to stop.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from vmkd_fx.progress import Progress, progress


@contextmanager
def watched(trt: Any, config: Any, title: str, show: bool) -> Iterator[None]:
    """Follow the build that happens in this block.

    Args:
        trt: the module of the package.
        config: the builder's; its `progress_monitor` is set.
        title: what is being built.
        show: whether to show anything; Ctrl-C ends the build either way.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; raised when the builder has stopped.
    """
    with _interrupts() as interrupted:
        monitor = _monitor(trt, title, show, interrupted)  # must outlive the build
        config.progress_monitor = monitor
        try:
            yield
        finally:
            monitor.close("stopped")
    if interrupted.is_set():
        raise KeyboardInterrupt


class _Interrupted:
    """Whether Ctrl-C was pressed since the block began."""

    def __init__(self, pipe: int | None) -> None:
        self._pipe = pipe
        self._pressed = False

    def is_set(self) -> bool:
        """Look for it."""
        if self._pipe is not None:
            with suppress(BlockingIOError):
                self._pressed |= signal.SIGINT in os.read(self._pipe, 4096)
        return self._pressed


@contextmanager
def _interrupts() -> Iterator[_Interrupted]:
    """Collect Ctrl-C instead of raising it, which only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield _Interrupted(None)
        return
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    interrupted = _Interrupted(reading)
    former_handler = signal.signal(signal.SIGINT, lambda *_: None)
    former_pipe = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield interrupted
    finally:
        signal.set_wakeup_fd(former_pipe)
        signal.signal(signal.SIGINT, former_handler)
        interrupted.is_set()
        interrupted._pipe = None
        os.close(reading)
        os.close(writing)


def _monitor(trt: Any, title: str, show: bool, interrupted: _Interrupted) -> Any:
    class Monitor(trt.IProgressMonitor):
        """The three callbacks; none of them may raise."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost = ""
            self.done = self.steps = 0
            self.bar: Progress[int] | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with suppress(Exception):
                if parent_phase is None:
                    self.close("done")
                    self.outermost, self.done, self.steps = phase_name, 0, num_steps
                    self.bar = progress(num_steps, title, show=show)
                elif self.bar is not None:
                    self.bar.note(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with suppress(Exception):
                if phase_name == self.outermost and self.bar is not None:
                    self.bar.update(step + 1 - self.done)
                    self.done = step + 1
                return not interrupted.is_set()
            return True

        def phase_finish(self, phase_name: str) -> None:
            with suppress(Exception):
                if phase_name == self.outermost and self.bar is not None:
                    self.bar.update(self.steps - self.done)
                    self.close("done")

        def close(self, word: str) -> None:
            bar, self.bar = self.bar, None
            if bar is not None:
                bar.note("")
                bar.close(word)

    return Monitor()
