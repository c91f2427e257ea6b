"""Random numbers that follow from a key alone.

Image libraries draw from three global generators: Python's, NumPy's and PyTorch's. Before an image is
augmented all three are set from the image's key, and after a batch they are put back to where they were.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def words(*key: int, use: int = 0) -> tuple[int, ...]:
    """Four random words of 32 bits that follow from `key`; another `use` of one key gets others."""
    # A hash of a fixed definition, several times quicker than NumPy's SeedSequence.
    packed = struct.pack(f"<{len(key) + 1}Q", use, *key)
    return struct.unpack("<4L", hashlib.blake2b(packed, digest_size=16).digest())


def seed_generators(*key: int) -> None:
    """Set the global generators of Python, NumPy and PyTorch (its CPU's alone) from `key`."""
    first, second, third, fourth = words(*key)
    random.seed(first)
    np.random.seed(second)
    # torch.manual_seed would reach for every CUDA device as well.
    torch.default_generator.manual_seed(third << 32 | fourth)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put the three global generators back when the block ends."""
    python, arrays, tensors = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.default_generator.set_state(tensors)
