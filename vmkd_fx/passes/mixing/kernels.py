"""The kernel h of a circulant mixer and of a global filter.

    y[i] = sum over k of h[k] x[(i + k) mod N]

A circulant mixer's weight (G, N) is h itself. A global filter multiplies spectra, so it convolves:

    y = k * x,    k = filter of a unit impulse,    h[i, j] = k[-i, -j]

This is exact for every weight, also where the columns at width frequencies 0 and W/2 are not Hermitian. There
the filter keeps Re(ifft_u(K[u] X[u])), and because x is real, X[-u] = conj(X[u]) in these columns, this is

    ifft_u of (K[u] X[u] + conj(K[-u] X[-u])) / 2  =  ifft_u of (K[u] + conj(K[-u])) / 2 * X[u],

so the filter is one circular convolution, whose spectrum is the Hermitian part of K in these columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmkd_fx.models.global_filter import global_filter


def filter_kernel(weight: Tensor, width: int) -> Tensor:
    """h (C, H, W) of a global filter's weight (H, W // 2 + 1, C, 2), in the dtype of the weight."""
    height, _, channels, _ = weight.shape
    impulse = weight.new_zeros(1, height, width, channels)
    impulse[:, 0, 0] = 1
    response = global_filter(impulse, weight)[0].permute(2, 0, 1)
    return torch.roll(response.flip(1, 2), (1, 1), (1, 2)).contiguous()
