"""Random numbers: the same in every process while a training is set up, then others in each."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def seed_process(seed: int, rank: int) -> None:
    """Seed process `rank` for its steps, so that no two drop the same paths; process 0 goes on as it is."""
    if rank:
        state = np.random.SeedSequence([seed, rank]).generate_state(1, np.uint32)
        seed_all(int(state[0]))
