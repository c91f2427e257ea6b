"""How much memory a training will need, said before its first step.

Weights, gradients and the optimiser's state follow from shapes. What a forward pass keeps for the backward
pass is measured on a few images, of which it is a linear function: twice, so that what does not grow with the
batch drops out. The sum is a little too much, for gradients come while activations go.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vmkd_fx.distill.cache.teacher import rehearsal
from vmkd_fx.distill.checkpoint import rng_state, set_rng_state
from vmkd_fx.distill.data import ImageData
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.distill.training.optimisation import make_optimizer
from vmkd_fx.distill.training.precision import Precision
from vmkd_fx.distill.training.world import World
from vmkd_fx.graph.share import unwrapped

_KEPT_FILES = ("active_file ", "inactive_file ")
FEW = (2, 4)
"""How many images are measured on; mutual information and batch statistics need two."""


@dataclass(frozen=True)
class Memory:
    """What one process needs, in bytes.

    Attributes:
        student: its weights and buffers, with what learns beside it.
        teachers: theirs; those on other devices are left out.
        gradients: of everything that learns, and DistributedDataParallel's buckets of them.
        optimizer: its state.
        average: the averaged copy.
        activations: what is kept between forward and backward, and the teachers' own, at its largest.
        images: in one piece of a step, which the activations are for.
        processes: on this machine that share the memory; 1 where each has a GPU.
        free: what the device has left; None where nobody says.
    """

    student: int
    teachers: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    images: int
    processes: int = 1
    free: int | None = None

    @property
    def total(self) -> int:
        """Of one process."""
        parts = (self.student, self.teachers, self.gradients, self.optimizer, self.average)
        return sum(parts) + self.activations

    @property
    def missing(self) -> int:
        """What the device has too little; 0 where it fits or nobody knows. Student and teachers are there."""
        if self.free is None:
            return 0
        return max(0, (self.total - self.student - self.teachers) * self.processes - self.free)

    def problem(self, config: TrainConfig) -> str | None:
        """What to say where it does not fit, and what would; None where it does."""
        if not self.missing:
            return None
        several = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"this training needs about {in_bytes(self.total)}{several}, of which "
            f"{in_bytes(self.activations)} are for {self.images} images at once, and "
            f"{in_bytes(self.free or 0)} are free: {self._advice(config)}"
        )

    def _advice(self, config: TrainConfig) -> str:
        for pieces in range(2, self.images + 1):
            if self.images % pieces == 0:
                smaller = replace(self, activations=self.activations // pieces, images=self.images // pieces)
                if not smaller.missing:
                    return (
                        f"train.accumulation={config.accumulation * pieces} would need about "
                        f"{in_bytes(smaller.total)}"
                    )
        half = "" if config.amp else "train.amp=bfloat16, "
        return (
            f"{half}a smaller train.batch_size, a smaller student or a cache of the teachers would need less"
        )


def estimate(task: TrainingTask, data: ImageData, config: TrainConfig, world: World) -> Memory:
    """The memory that training `task` needs, before anything wraps it. The task is left as it was."""
    student = unwrapped(task.get_trainable_module())
    own = _held(student)
    learning = sum(_size(parameter) for parameter in student.parameters() if parameter.requires_grad)
    teachers = [part for part in getattr(task, "teachers", ()) if _is_on(part, world.device)]
    sharded = world.joined and config.distributed == "fsdp"
    share = world.size if sharded else 1
    images = max(1, min(len(data), config.batch_size) // world.size // config.accumulation)
    gpu = world.device.type == "cuda"
    return Memory(
        student=own // share,
        teachers=sum(map(_held, teachers)),
        gradients=learning // share * (2 if world.joined and not sharded else 1),
        optimizer=int(learning * _state_per_byte(config)) // share,
        average=own // share if config.ema_decay is not None else 0,
        activations=_activations(task, data, config, world, images),
        images=images,
        processes=1 if gpu else int(os.environ.get("LOCAL_WORLD_SIZE", world.size)),
        free=free_memory(world.device),
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on `device`; None where the system does not say."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    found = [free for free in (_system_free(), _group_free()) if free is not None]
    return min(found, default=None)


def in_bytes(count: int) -> str:
    """Bytes as 512 KiB, 3.4 MiB or 12.0 GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make while it is on, and the most that lived at once."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        tensors = (*known.parameters(), *known.buffers())
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def _activations(task: TrainingTask, data: ImageData, config: TrainConfig, world: World, images: int) -> int:
    """The most that a forward pass of `images` images holds beside the weights."""
    counts = tuple(min(few, images) for few in FEW)
    with _as_it_was(task):
        found = [_forward_peak(task, data, config, world, count) for count in counts]
    if counts[0] == counts[1]:
        return found[1]
    an_image = (found[1] - found[0]) / (counts[1] - counts[0])
    return int(found[1] + max(0.0, an_image) * (images - counts[1]))


def _forward_peak(task: TrainingTask, data: ImageData, config: TrainConfig, world: World, count: int) -> int:
    images = torch.randn(count, *data.input_size, device=world.device)
    if config.channels_last:
        images = images.to(memory_format=torch.channels_last)
    target = torch.arange(count, device=world.device) % data.num_classes
    live = LiveTensors(task)
    with rehearsal(task), Precision(config.amp, world.device).autocast(), live:
        output = task(images, target)
    del output
    return live.peak + images.nbytes


@contextmanager
def _as_it_was(task: TrainingTask) -> Iterator[None]:
    """Buffers, modes, epoch and the state of the random generators are put back."""
    buffers = [(buffer, buffer.clone()) for buffer in task.buffers()]
    modes = [(module, module.training) for module in task.modules()]
    epoch, random = getattr(task, "epoch", None), rng_state()
    try:
        task.train()
        if isinstance(task, DistillationTask):
            task.set_epoch(0)
        yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
        for module, mode in modes:
            module.training = mode
        if isinstance(task, DistillationTask):
            task.epoch = epoch
        set_rng_state(random)


def _state_per_byte(config: TrainConfig) -> float:
    """Bytes of the optimiser's state for each byte of weights, found on one small layer."""
    with torch.random.fork_rng(devices=()):
        layer = nn.Linear(64, 64)
    optimizer = make_optimizer(layer, config.model_copy(update={"layer_decay": None}))
    layer(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    state = [
        value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)
    ]
    return sum(map(_size, state)) / sum(map(_size, layer.parameters()))


def _held(module: nn.Module) -> int:
    return sum(map(_size, (*module.parameters(), *module.buffers())))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_on(module: nn.Module, device: torch.device) -> bool:
    first = next(module.parameters(), None)
    return first is None or first.device == device


def _system_free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None


def _group_free(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container may still take, by its control group. Files that the system keeps in memory count as
    taken there, and it gives them up when it is asked for memory.
    """
    try:
        limit, taken = (
            int((folder / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current")
        )
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        files = sum(int(line.split()[1]) for line in lines if line.startswith(_KEPT_FILES))
    except (OSError, ValueError, IndexError):  # no limit is the word "max"
        return None
    return max(0, limit - taken + files)
