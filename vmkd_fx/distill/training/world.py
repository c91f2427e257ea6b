"""The processes that train one student together, as torchrun starts them.

    torchrun --nproc-per-node 8 -m vmkd_fx train recipe.yaml

Without torchrun's environment there is one process, and nothing here talks to anyone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vmkd_fx.errors import RecipeError, TrainingError, VmkdError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process among those of a training.

    Attributes:
        device: of this process.
        rank: its number, from 0; process 0 writes.
        size: how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def joined(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each of them."""
        if self.joined:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether one process at least says so."""
        return bool(self.total(torch.tensor(float(flag), device=self.device)) > 0) if self.joined else flag

    def gathered(self, value: T) -> list[T]:
        """What every process has, in the order of ranks, in each of them."""
        if not self.joined:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_first(self, work: Callable[[], T]) -> T:
        """Do `work` in process 0 alone; all get its result.

        Raises:
            VmkdError: in process 0, as `work` raised it.
            TrainingError: in the others, where process 0 refused.
        """
        if not self.joined:
            return work()
        answer: list[Any] = [None, None]
        refusal: VmkdError | None = None
        if self.first:
            try:
                answer[0] = work()
            except VmkdError as error:
                refusal, answer[1] = error, str(error)
        dist.broadcast_object_list(answer, src=0)
        if refusal is not None:
            raise refusal
        if answer[1] is not None:
            raise TrainingError(f"process {self.rank} ends because process 0 refused: {answer[1]}")
        result: T = answer[0]
        return result

    def share_buffers(self, *modules: nn.Module | None) -> None:
        """Give every process the buffers of process 0: running statistics differ by what each has seen."""
        if not self.joined:
            return
        for module in modules:
            for buffer in module.buffers() if module is not None else ():
                dist.broadcast(buffer, src=0)


@contextmanager
def joined_world(device: str | None = None) -> Iterator[World]:
    """The world that the environment describes, for as long as the block runs.

    The processes talk over NCCL between GPUs and over gloo between CPUs. A process group that is there
    already is used and left as it is.

    Args:
        device: "cpu", "cuda" or "cuda:1"; None takes a GPU where there is one. With several processes on one
            machine each takes the GPU of its own number.

    Raises:
        RecipeError: there is no such device, or not one for each process.
    """
    there = dist.is_available() and dist.is_initialized()
    size = dist.get_world_size() if there else _number("WORLD_SIZE", 1)
    rank = dist.get_rank() if there else _number("RANK", 0)
    chosen = _device(device, _number("LOCAL_RANK", 0), size > 1)
    if chosen.type == "cuda" and size > 1:
        torch.cuda.set_device(chosen)
    if there or size == 1:
        yield World(chosen, rank, size)
        return
    # Objects and flags travel between CPUs in both cases.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=size
    )
    yield World(chosen, rank, size)
    # Not after an error: the others may be waiting elsewhere, and NCCL would wait for them here.
    dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _device(name: str | None, local_rank: int, several: bool) -> torch.device:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if found else "cpu"))
    except RuntimeError as error:
        raise RecipeError(
            f"train.device is {name!r}; give cpu, cuda, or a GPU by number as cuda:1"
        ) from error
    if device.type != "cuda":
        return device
    if several and device.index is not None:
        raise RecipeError(
            f"train.device is {name!r} and several processes train; leave it out, or say cuda: each process "
            "takes the GPU of its own number"
        )
    index = device.index if device.index is not None else local_rank if several else 0
    if index >= found:
        raise RecipeError(
            f"GPU {index} is needed and {found} can be used here; start at most {found} processes on this "
            "machine (torchrun --nproc-per-node), or train with train.device=cpu"
        )
    return torch.device("cuda", index)
