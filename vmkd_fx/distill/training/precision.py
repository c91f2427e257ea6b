"""Half precision: autocast around the forward, the loss scaled where gradients could vanish."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmkd_fx.errors import RecipeError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """How a step computes: in float32, or under autocast.

    float16 has five bits of exponent, in which small gradients become zero: the loss is multiplied by a
    factor before the backward pass and the gradients are divided by it; steps in which they overflow are left
    out and the factor is halved (Micikevicius et al., 2018). bfloat16 has the range of float32.

    Args:
        amp: "bfloat16", "float16" or None.
        device: that of the student.

    Raises:
        RecipeError: the device has no autocast.
    """

    def __init__(self, amp: str | None, device: torch.device) -> None:
        if amp is not None and not torch.amp.is_autocast_available(device.type):
            raise RecipeError(f"train.amp is {amp} and {device.type} has no autocast; leave train.amp out")
        self.device = device
        self.dtype = None if amp is None else DTYPES[amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    @property
    def scales(self) -> bool:
        """Whether a step may be left out because its gradients overflowed."""
        return bool(self.scaler.is_enabled())

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor, create_graph: bool = False) -> None:
        """Gradients of `loss`, multiplied by the factor."""
        self.scaler.scale(loss).backward(create_graph=create_graph)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the factor, so that they can be measured and clipped."""
        if self.scales:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimiser step, unless gradients overflowed, and adapt the factor."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The factor and its history; empty where nothing is scaled."""
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        if state and self.scales:
            self.scaler.load_state_dict(state)
