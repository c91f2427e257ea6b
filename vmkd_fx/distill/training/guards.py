"""A training that has gone wrong stops, and leaves the batch on which it did for whoever wants to look."""

from __future__ import annotations

import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import safetensors.torch

from vmkd_fx.distill.data import Batch
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.run_folder import BAD_BATCHES
from vmkd_fx.files import writing

WINDOW = 20
"""Steps over which the size of the loss, at the start and now, is a median."""
MOST_OVERFLOWS = 50
"""Steps in a row that float16 may leave out: from the factor's start it can be halved that often and more."""


class Guard:
    """Watches the loss and the gradient of every step.

    Args:
        config: its `spike` says how far the loss may rise above its latest median: that many times the median
            of its size over the first steps, which counts as 1 at least, so that a loss that is nearly 0 may
            have a hard batch.
        scales: whether a gradient that overflows is left out, as in float16, and is no reason to stop.
    """

    def __init__(self, config: TrainConfig, scales: bool = False) -> None:
        self.config, self.scales = config, scales
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.size: float | None = None
        self.overflows = 0

    def problem(self, terms: dict[str, float], norm: float, step: int) -> str | None:
        """What is wrong with a step before its weights change, and what may help; None where nothing is.

        Args:
            terms: of the loss, means over all processes.
            norm: of the gradient.
            step: its number, from 1.
        """
        advice = f"try a smaller lr (now {self.config.lr}) or clip_grad (now {self.config.clip_grad})"
        bad = [key for key, value in terms.items() if not math.isfinite(value)]
        if bad:
            # "loss" is the sum of the others: where one of them is at fault, it is the better name.
            term = next((key for key in bad if key != "loss"), "loss")
            return f"the term {term!r} of the loss is {terms[term]} at step {step}: {advice}"
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if self.overflows > (MOST_OVERFLOWS if self.scales else 0):
            often = f" for {self.overflows} steps in a row" if self.scales else ""
            half = "; bfloat16 has the range of float32 (train.amp)" if self.scales else ""
            return f"the gradient is {norm} at step {step}{often}, and the loss is finite: {advice}{half}"
        return self._spike(terms["loss"], step, advice)

    def _spike(self, loss: float, step: int, advice: str) -> str | None:
        if self.size is None:
            if len(self.recent) == WINDOW:
                self.size = max(1.0, statistics.median(map(abs, self.recent)))
        elif self.config.spike is not None:
            level = statistics.median(self.recent)
            if loss > level + self.config.spike * self.size:
                return (
                    f"the loss jumped from {level:.4g} to {loss:.4g} at step {step}, by more than "
                    f"{self.config.spike:g} times its size at the start ({self.size:.4g}): {advice}, or a "
                    "larger train.spike"
                )
        self.recent.append(loss)
        return None

    def state_dict(self) -> dict[str, Any]:
        """What the next step is held against, as plain data."""
        return {"recent": list(self.recent), "size": self.size, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.recent = deque(state["recent"], maxlen=WINDOW)
        self.size, self.overflows = state["size"], state["overflows"]


def batch_file(out: Path, step: int, rank: int) -> Path:
    """Where `save_batch` writes what process `rank` had at a step."""
    return out / BAD_BATCHES.replace("*", f"step{step}-rank{rank}")


def save_batch(out: Path, batch: Batch, *, epoch: int, step: int, rank: int) -> Path:
    """Write the images, targets and indices of one process's batch, and where in the training it stood.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
    """
    path = batch_file(out, step, rank)
    tensors = {name: value.detach().cpu().contiguous() for name, value in batch._asdict().items()}
    where = {"epoch": str(epoch), "step": str(step), "rank": str(rank)}
    data = safetensors.torch.save(tensors, where)
    with writing(path) as temporary:
        temporary.write_bytes(data)
    return path


def how_to_look(path: Path) -> str:
    """The call that opens what `save_batch` wrote."""
    return (
        f'the batch is in {path}: safetensors.torch.load_file("{path.name}") gives its "images", "targets" '
        'and "indices"'
    )
