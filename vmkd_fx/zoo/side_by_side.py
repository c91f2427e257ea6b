"""Many models through one check, in processes of their own: a model that kills its process costs one row."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from vmkd_fx.progress import progress
from vmkd_fx.zoo.journal import R


def side_by_side(
    check: Callable[[str], R], died: Callable[[str], R], names: list[str], before: int, jobs: int | None
) -> Iterator[R]:
    """Rows of `names` as they get ready.

    Where a process dies, a model too large for the machine say, the models that were under way are checked
    one by one, so that only the one that kills its process goes without an answer.

    Args:
        check: a function of a module, for another process finds it by its name.
        died: the row of a model that killed its process.
        names: of the models.
        before: how many more have a row already.
        jobs: processes; one for each core by default.
    """
    jobs = jobs or os.cpu_count() or 1
    waiting = dict.fromkeys(names)
    with progress(before + len(names), "sweep", initial=before) as bar:
        together = jobs
        while waiting:
            batch = list(waiting) if together > 1 or jobs == 1 else list(waiting)[:jobs]
            try:
                for row in _in_processes(check, batch, together):
                    del waiting[row.model]
                    bar.note(row.model)
                    bar.update()
                    yield row
                together = jobs
            except BrokenProcessPool:
                if together > 1:
                    together = 1
                    continue
                name = next(iter(waiting))
                del waiting[name]
                bar.update()
                yield died(name)


def _in_processes(check: Callable[[str], R], names: list[str], jobs: int) -> Iterator[R]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_quietly) as pool:
        todo = iter(names)
        under_way: set[Future[R]] = set()
        while True:
            for name in islice(todo, 2 * jobs - len(under_way)):
                under_way.add(pool.submit(check, name))
            if not under_way:
                return
            ready, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in ready:
                yield future.result()


def _quietly() -> None:
    """One thread a process, and no warnings about models with new names."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
