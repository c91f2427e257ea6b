"""Processes for tests: forked from one that has imported everything, so that each starts at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import vmkd_fx.distill.trainer  # noqa: F401 (once, not in every process)
from vmkd_fx.distill.data import Digits

with contextlib.suppress(ModuleNotFoundError):
    import torch.utils.tensorboard

DATA = Digits(labelled=80, image_size=16)

_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload([__name__])


class Group:
    """`work(rank, size, *given)` in so many processes, joined over gloo where there are several."""

    def __init__(self, folder: Path, size: int, work: Callable[..., None], *given: Any) -> None:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="store-") as store:
            name = store.name  # taken, and free again when the block ends
        self.processes = [
            _forked.Process(target=_run, args=(name, rank, size, work, given)) for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> list[int | None]:
        """kill -9, all of them."""
        for process in self.processes:
            process.kill()
        return self.wait()

    def wait(self) -> list[int | None]:
        """Exit statuses."""
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]


def _run(store: str, rank: int, size: int, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    work(rank, size, *given)
    if size > 1:
        dist.destroy_process_group()
