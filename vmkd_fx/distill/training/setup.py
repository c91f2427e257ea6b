"""From a task and a recipe to what a step needs: precision, memory layout, average, optimiser, processes.

The order matters. The average is a copy, so it is made before anything wraps the student; an optimiser holds
the parameters that `fully_shard` puts in place of others; torch.compile comes before
DistributedDataParallel, which cuts the compiled graph at its buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from torch import nn

from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.training.optimisation import make_optimizer, make_scheduler
from vmkd_fx.distill.training.precision import Precision
from vmkd_fx.distill.training.world import World
from vmkd_fx.errors import RecipeError
from vmkd_fx.graph.share import unwrapped


@dataclass(frozen=True)
class Prepared:
    """What a training works with.

    Attributes:
        module: the trainable module without wrappers; its keys are those of checkpoints.
        ema: its averaged copy; None without.
        optimizer, scheduler: timm's.
        precision: autocast and scaling.
    """

    module: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    precision: Precision


def prepare(task: TrainingTask, config: TrainConfig, world: World, steps_per_epoch: int) -> Prepared:
    """Make `task` ready for training, in place.

    Raises:
        RecipeError: the settings do not go together, or not with this machine.
    """
    _check(config, world)
    precision = Precision(config.amp, world.device)
    task.to(world.device)
    sharded = world.joined and config.distributed == "fsdp"
    module: nn.Module = unwrapped(task.get_trainable_module())
    if config.channels_last:
        module.to(memory_format=torch.channels_last)
    if config.sync_batchnorm and world.joined:
        _synchronise(module)
    if config.ema_decay is not None:
        # With warm-up, or a short training's average would still be its random beginning.
        task.setup_ema(decay=config.ema_decay, use_warmup=True, foreach=not sharded)
    average = task.get_trainable_module(ema=True)
    ema = None if average is None else unwrapped(average)
    if sharded:
        from vmkd_fx.distill.training.sharding import shard

        for part in (module, ema):
            if part is not None:
                shard(part, world)
    optimizer = make_optimizer(module, config)
    if config.compile:
        task.compile()
    if world.joined and not sharded:
        task.prepare_distributed(device_ids=[world.device.index] if world.device.type == "cuda" else None)
    return Prepared(module, ema, optimizer, make_scheduler(optimizer, config, steps_per_epoch), precision)


def _check(config: TrainConfig, world: World) -> None:
    if config.sync_batchnorm and world.joined and world.device.type == "cpu":
        raise RecipeError(
            "train.sync_batchnorm: torch's SyncBatchNorm works on GPUs alone; leave it out on CPUs"
        )
    if config.distributed == "fsdp" and config.clip_mode == "agc":
        raise RecipeError(
            "train.clip_mode agc looks at whole weights, and train.distributed fsdp cuts them; clip by norm"
        )
    if config.distributed == "fsdp" and config.amp == "float16":
        raise RecipeError("train.distributed fsdp goes with train.amp bfloat16 or none, not with float16")


def _synchronise(module: nn.Module) -> None:
    """Put a SyncBatchNorm in the place of every BatchNorm, under the same name and with the same tensors."""
    from timm.layers import convert_sync_batchnorm

    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child))
