"""A training between two steps, from the objects that hold it to a checkpoint and back."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmkd_fx.distill.checkpoint import (
    ResumeState,
    load_resume,
    load_state,
    rng_state,
    save_resume,
    set_rng_state,
)
from vmkd_fx.distill.run_folder import Identity
from vmkd_fx.distill.training.guards import Guard
from vmkd_fx.distill.training.setup import Prepared
from vmkd_fx.distill.training.sharding import cut_like, cut_optimizer_state, whole
from vmkd_fx.distill.training.world import World


@dataclass
class Position:
    """Where a training stands.

    Attributes:
        step: optimiser steps done.
        epoch, batch: of the next batch; behind the last batch of an epoch its evaluation is next.
        sums: of the loss terms over the epoch.
        scores: the latest accuracies and the best one.
        started: on the monotonic clock, earlier starts counted in.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Spent in training and evaluation so far."""
        return time.monotonic() - self.started

    def stepped(self, terms: dict[str, float]) -> None:
        """One more step is done."""
        self.step, self.batch = self.step + 1, self.batch + 1
        self.sums = {key: self.sums.get(key, 0.0) + value for key, value in terms.items()}

    def next_epoch(self) -> None:
        """An epoch and its evaluation are done."""
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}


@dataclass(frozen=True)
class Checkpoints:
    """Writes and reads the resume state of one training. All processes call it; process 0 touches the file.

    Attributes:
        path: of the file.
        training: which one it is.
        parts, guard: what changes beside the position.
        world: the processes.
    """

    path: Path
    training: Identity
    parts: Prepared
    guard: Guard
    world: World

    def save(self, position: Position) -> None:
        """Write the state at `position`; a failure leaves the former file whole.

        Raises:
            OutputError: the disk is full, or the folder cannot be written to.
        """
        parts = self.parts
        state = ResumeState(
            digest=self.training.digest,
            settings=dict(self.training.settings),
            step=position.step,
            epoch=position.epoch,
            batch=position.batch,
            module=whole(parts.module.state_dict()),
            ema=None if parts.ema is None else whole(parts.ema.state_dict()),
            optimizer=whole(parts.optimizer.state_dict()),
            precision=parts.precision.state_dict(),
            guard=self.guard.state_dict(),
            rng=self.world.gathered(rng_state()),
            sums=position.sums,
            scores=position.scores,
            seconds=position.seconds,
        )
        self.world.from_first(lambda: save_resume(self.path, state))

    def load(self) -> Position | None:
        """Go to the state in the file; None if there is no file.

        Raises:
            CheckpointError: it belongs to another recipe or model, or is damaged.
        """
        state = self.world.from_first(self._read)
        if state is None:
            return None
        parts, source = self.parts, str(self.path)
        load_state(parts.module, cut_like(state.module, parts.module.state_dict()), source)
        if parts.ema is not None and state.ema is not None:
            load_state(parts.ema, cut_like(state.ema, parts.ema.state_dict()), source)
        parts.optimizer.load_state_dict(cut_optimizer_state(state.optimizer, parts.optimizer))
        parts.precision.load_state_dict(state.precision)
        self.guard.load_state_dict(state.guard)
        self._continue_random(state.rng)
        started = time.monotonic() - state.seconds
        return Position(state.step, state.epoch, state.batch, state.sums, state.scores, started)

    def _read(self) -> ResumeState | None:
        if not self.path.exists():
            return None
        state = load_resume(self.path)
        self.training.check(f"{self.path} is", state.digest, state.settings)
        return state

    def _continue_random(self, states: list[dict[str, Any]]) -> None:
        if len(states) == self.world.size:
            set_rng_state(states[self.world.rank])
        elif self.world.first:
            print(
                f"{self.path} was written by {len(states)} processes and {self.world.size} go on with it: "
                "dropout and other random numbers start anew",
                file=sys.stderr,
                flush=True,
            )
