"""One number an image, by which training sees that it has the image that the teacher saw.

    s(x) = 1 / sqrt(n) sum_i w_i x_i    with w_i = +1 or -1 from a hash of i

Of two different images the sketches differ like two draws of a normal distribution as wide as the pixels'.
Unlike a checksum it hardly moves when a pixel is rounded another way on another machine.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vmkd_fx.passes.heads.full_precision import in_full_precision

TOLERANCE = 0.02
"""Of normalised images, whose pixels spread by about 1: bfloat16 images differ by 0.003 from float32 ones,
and one in fifty images that are another would pass for the right one.
"""


@in_full_precision
def sketch(images: Tensor) -> Tensor:
    """The sketches (B,) of images (B, C, H, W), in float32 on their device."""
    flat = images.flatten(1)
    return (flat @ _signs(flat.shape[1], flat.device).to(flat.dtype)).float()


@lru_cache(maxsize=8)
def _signs(count: int, device: torch.device) -> Tensor:
    """(count,): +1 / sqrt(count) or -1 / sqrt(count), the same on every machine."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    signs = 1 - 2 * (state >> np.uint64(63)).astype(np.float64)
    return torch.from_numpy(signs / np.sqrt(count)).float().to(device)
