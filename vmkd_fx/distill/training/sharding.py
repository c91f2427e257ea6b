"""The student shared out to several processes, and put together again for checkpoints.

`fully_shard` (FSDP2) cuts every parameter into as many parts as there are processes; each keeps its part of
the weights, of the gradients and of the optimiser's state. A graph is flat: blocks are not called as modules,
so the student is one unit, whose weights are gathered for a step and given up behind it. What stays cut for
good is what is largest: gradients, the optimiser's state and the averaged weights.

Checkpoints hold whole tensors and fit any number of processes, and none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vmkd_fx.distill.training.world import World


def shard(module: nn.Module, world: World) -> None:
    """Cut the parameters of `module`, in place; an optimiser must be made afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=init_device_mesh(world.device.type, (world.size,)))


def whole(value: Any) -> Any:
    """`value` with every tensor in it put together, and on the CPU if it had been cut.

    All processes must ask, in the same order.
    """
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item) for item in value)
    return value


def cut_like(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, cut as those under the same keys are."""
    return {key: _cut(value, like.get(key)) for key, value in state.items()}


def cut_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of an optimiser, cut as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        index: {key: _cut(value, parameters[index]) for key, value in moments.items()}
        for index, moments in state["state"].items()
    }
    return {**state, "state": cut}


def _cut(value: Any, like: Tensor | None) -> Any:
    """`value` cut as `like` is, where it is as large; a step's count stays what it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
