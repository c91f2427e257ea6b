"""Adapter for the recorded circulant channel-specific mixing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.golden.case import Case
from vmkd_fx.passes.circulant_mixer import (
    CirculantMixer,
    channel_groups,
    circulant_by_matrices,
    dense_circulant,
    spectra,
)


def replay_ccs(case: Case) -> dict[str, Tensor]:
    """10_ccs: the mixer, its matrices, the factors of Eq. 8 and the gradients of sum(y * gy)."""
    tokens, channels, groups = (case.config[name] for name in "NCG")
    x = case.arrays["in/x"].clone().requires_grad_()
    mixer = CirculantMixer(tokens, channels, groups, dtype=torch.float64)
    mixer.load_state_dict({"weight": case.arrays["in/w"]})
    y = mixer(x)
    y.backward(case.arrays["in/gy"])
    assert x.grad is not None and mixer.weight.grad is not None
    with torch.no_grad():
        tokens_spectrum, weight_spectrum = spectra(x, mixer.weight)
        return {
            "out/y": y.detach(),
            "out/y_dense": circulant_by_matrices(x, mixer.weight),
            "out/dense_circulant": dense_circulant(mixer.weight),
            "out/group_of_channel": channel_groups(channels, groups),
            "out/X_re": tokens_spectrum.real,
            "out/X_im": tokens_spectrum.imag,
            "out/W_re": weight_spectrum.real,
            "out/W_im": weight_spectrum.imag,
            "grad/x": x.grad,
            "grad/w": mixer.weight.grad,
        }


CASES: dict[str, Callable[[Case], dict[str, Tensor]]] = {"10_ccs": replay_ccs}
