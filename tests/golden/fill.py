"""Weights by a rule instead of a file: each value is a hash of the parameter's name and place.

seed = crc32("salt:key"), h_i = fmix32(i * 2654435761 + seed), u_i = (h_i >> 8) / 2^23 - 1, scaled by the kind
of parameter and rounded to float32.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MASK = np.uint64(0xFFFFFFFF)


def filled(meta: dict[str, Any]) -> dict[str, Tensor]:
    """All weights of a file that was made by the rule, by the authors' keys."""
    fill = meta["fill"]
    return {key: fill_value(fill["salt"], key, tuple(s)) for key, s in fill["state_dict_keys"].items()}


def fill_value(salt: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """The weight `key` of this shape, float64."""
    u = _uniform(f"{salt}:{key}", math.prod(shape))
    last = key.rpartition(".")[2]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    scale, shift = _scale_and_shift(last, shape)
    values = (shift + scale * u).astype(np.float32).astype(np.float64)
    return torch.from_numpy(values).reshape(shape)


def _scale_and_shift(last: str, shape: tuple[int, ...]) -> tuple[float, float]:
    named = {
        "running_mean": (0.1, 0.0),
        "running_var": (0.5, 1.0),
        "pos_embed": (0.2, 0.0),
        "complex_weight": (0.5, 0.0),
        "gamma": (0.25, 0.5),
    }
    if last in named:
        return named[last]
    if len(shape) >= 2:
        return float(np.sqrt(3.0 / math.prod(shape[1:]))), 0.0
    return (0.25, 1.0) if last == "weight" else (0.1, 0.0)


def _uniform(name: str, count: int) -> Any:
    seed = np.uint64(zlib.crc32(name.encode()))
    h = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + seed) & _MASK
    h ^= h >> np.uint64(16)
    h = (h * np.uint64(0x85EBCA6B)) & _MASK
    h ^= h >> np.uint64(13)
    h = (h * np.uint64(0xC2B2AE35)) & _MASK
    h ^= h >> np.uint64(16)
    return (h >> np.uint64(8)).astype(np.float64) / 8388608.0 - 1.0
