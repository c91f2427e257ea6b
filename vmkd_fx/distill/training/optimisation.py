"""timm's optimiser, schedule and clipping, as a recipe asks for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.errors import RecipeError


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """timm's optimiser over the groups that timm makes: without weight decay what is one-dimensional and what
    the model names, and by depth where there is `layer_decay`.

    Raises:
        RecipeError: the optimiser takes other options.
    """
    try:
        return create_optimizer_v2(
            module,
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **_options(config.optimizer_options),
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"timm's optimizer {config.optimizer!r} refuses its options {config.optimizer_options}: {error}"
        ) from error


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe's lists as the tuples that optimisers expect."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> Scheduler:
    """timm's schedule, updated at every step."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.lr / 100 if config.warmup_lr is None else config.warmup_lr,
        min_lr=config.min_lr,
        decay_epochs=config.decay_epochs,
        decay_rate=config.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm over all gradients, a scalar."""
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in parameters if parameter.grad is not None]
    )
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clip(parameters: list[nn.Parameter], config: TrainConfig, norm: Tensor) -> None:
    """Clip the gradients, whose norm is `norm`, by timm's `clip_mode`."""
    if config.clip_grad is None:
        return
    if config.clip_mode == "norm":
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_grad, norm)
    else:
        dispatch_clip_grad(parameters, config.clip_grad, mode=config.clip_mode)
