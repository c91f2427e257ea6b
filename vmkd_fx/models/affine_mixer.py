"""RIFormer's token mixer that mixes no tokens (Wang et al., 2023, Sec. 4.3): an affine for each channel.

    Affine(n, s, t) = s n + t - n                                                                     (Eq. 1)
    x + Affine(LN(x; g, b), s, t) = x + LN(x; g (s - 1), b (s - 1) + t)                         (Eq. 2 to 4)

The input is subtracted as PoolFormer's pooling does it, so that s = 1, t = 0 adds nothing to the residual. In
training s and t learn beside the norm's own weight and bias; for deployment they merge into them, exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AffineMixer", "merged_into_norm"]


class AffineMixer(nn.Module):
    """Eq. 1 in place of a token mixer.

    Args:
        dim: channels C.
        channels_last: whether the input is (B, N, C) or (B, H, W, C), and not (B, C, H, W).
        device, dtype: of the parameters.
        others: what other token mixers take, `proj_drop` say; nothing here needs it.
    """

    def __init__(
        self, dim: int, channels_last: bool = False, device: Any = None, dtype: Any = None, **others: Any
    ) -> None:
        super().__init__()
        self.shape = (dim,) if channels_last else (dim, 1, 1)
        self.scale = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape) + self.shift.view(self.shape) - x

    def extra_repr(self) -> str:
        return f"{self.scale.numel()}, channels_last={len(self.shape) == 1}"


def merged_into_norm(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4: the weight and bias of a norm that does what the norm and an `AffineMixer` behind it do.

    Args:
        weight, bias: g and b of the norm before the mixer (C,).
        scale, shift: s and t of the mixer (C,).

    Returns:
        g (s - 1) and b (s - 1) + t, each (C,).
    """
    return weight * (scale - 1), bias * (scale - 1) + shift
