"""One step: gradients of a batch, in parts and over all processes, then the optimiser.

Every process has an equal part of the batch, and computes it in `accumulation` equal pieces. The loss of a
piece is divided by their number, and DistributedDataParallel takes the mean over processes, so that the
gradient is that of the mean over the whole batch. Gradients are exchanged with the last piece alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from vmkd_fx.distill.data import Batch
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.distill.training.optimisation import clip, gradient_norm
from vmkd_fx.distill.training.precision import Precision
from vmkd_fx.distill.training.world import World
from vmkd_fx.errors import RecipeError


@dataclass(frozen=True)
class Gradients:
    """What a step found before it changes the weights.

    Attributes:
        terms: of the loss, means over the batch of all processes.
        own: the same of this process alone.
        norm: of the gradient, before it is clipped.
        stop: whether one of the processes was asked to stop.
    """

    terms: dict[str, float]
    own: dict[str, float]
    norm: float
    stop: bool


class Stepper:
    """Computes steps of `task` with `optimizer`.

    Args:
        task: on the device of `world`; prepared for several processes where there are several.
        optimizer: of its trainable parameters.
        config: accumulation, clipping, memory layout.
        world: the processes.
        precision: autocast and scaling.
    """

    def __init__(
        self,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        world: World,
        precision: Precision,
    ) -> None:
        self.task, self.optimizer, self.config = task, optimizer, config
        self.world, self.precision = world, precision
        self.layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.parameters: list[nn.Parameter] = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        self._norm: Tensor | None = None

    def gradients(self, batch: Batch, asked: bool) -> Gradients:
        """Compute the gradients of this process's part of a batch, and exchange them.

        Args:
            batch: this process's part.
            asked: whether this process was asked to stop.
        """
        self.optimizer.zero_grad()
        pieces = list(self._pieces(batch))
        sums: dict[str, Tensor] = {}
        for place, piece in enumerate(pieces):
            last = place == len(pieces) - 1
            with nullcontext() if last else self.task.no_sync():
                with self.precision.autocast():
                    output = self._forward(piece)
                for key, value in output.items():
                    if key != "output" and value.numel() == 1:
                        sums[key] = sums.get(key, 0) + value.detach().double()
                loss = output["loss"] if len(pieces) == 1 else output["loss"] / len(pieces)
                self.precision.backward(loss, getattr(self.optimizer, "is_second_order", False))
        self.precision.unscale(self.optimizer)
        self._norm = gradient_norm(self.parameters)
        return self._read(sums, len(pieces), asked)

    def _forward(self, piece: Batch) -> dict[str, Tensor]:
        if isinstance(self.task, DistillationTask):
            return self.task(piece.images, piece.targets, piece.indices)
        return self.task(piece.images, piece.targets)

    def _read(self, sums: dict[str, Tensor], pieces: int, asked: bool) -> Gradients:
        """Bring everything that decides over this step to the CPU: once, for a GPU waits each time."""
        assert self._norm is not None
        values = torch.stack([*sums.values()]) / pieces
        flag = torch.tensor([float(asked)], dtype=values.dtype, device=values.device)
        own = torch.cat([values, flag, self._norm.detach().reshape(1).to(values)])
        found = own
        if self.world.joined:
            # The norm is that of all processes already.
            found = torch.cat([self.world.total(own[:-1].clone()) / self.world.size, own[-1:]])
        both = torch.stack([own, found]).tolist()
        mine, shared = (dict(zip(sums, line, strict=False)) for line in both)
        return Gradients(shared, mine, norm=both[1][-1], stop=both[1][-2] > 0)

    def apply(self) -> None:
        """Clip the gradients and let the optimiser step."""
        assert self._norm is not None
        clip(self.parameters, self.config, self._norm)
        self.precision.step(self.optimizer)

    def _pieces(self, batch: Batch) -> Iterator[Batch]:
        """Equal pieces of a batch, on the device."""
        parts = zip(*(tensor.chunk(self.config.accumulation) for tensor in batch), strict=True)
        for images, targets, indices in parts:
            images = images.to(self.world.device, non_blocking=True, memory_format=self.layout)
            yield Batch(images, targets.to(self.world.device, non_blocking=True), indices)


def check_shares(images: int, config: TrainConfig, world: World) -> None:
    """Refuse a batch that cannot be shared out evenly.

    Raises:
        RecipeError: says which batch would do.
    """
    size, parts = min(images, config.batch_size), world.size * config.accumulation
    if size % parts:
        raise RecipeError(
            f"a batch of {size} images is shared out to {world.size} processes, each with "
            f"{config.accumulation} pieces: train.batch_size must be a multiple of {parts}"
            + (f", and the data set has {images} images" if size < config.batch_size else "")
        )
