"""Realise circulant mixers as matrix products, which every runtime has.

    y[b, i, c] = sum over j of D[c mod G, i, j] x[b, j, c],   D[g, i, j] = w[g, (j - i) mod N]        (CCS Eq.
    7)

The matrices are written out once, in the precision of the weights. A Fourier transform needs less arithmetic
for many tokens, but ONNX and the engines have none that runs everywhere.
"""

from __future__ import annotations

import torch
from torch import nn

from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.circulant_mixer import CirculantMixer, dense_circulant
from vmkd_fx.passes.record import Record


class DenseTokenMixer(nn.Module):
    """Tokens mixed by a matrix a group of channels: x (B, N, C) to (B, N, C), `weight` (G, N, N).

    Channel c belongs to group c mod G.
    """

    stays_closed = True

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = self.weight.shape[0]
        if groups == 1:
            return torch.matmul(self.weight[0], x)
        grouped = x.unflatten(2, (x.shape[2] // groups, groups)).permute(0, 3, 1, 2)
        return torch.matmul(self.weight, grouped).permute(0, 2, 3, 1).flatten(2)

    def extra_repr(self) -> str:
        groups, tokens, _ = self.weight.shape
        return f"groups={groups}, tokens={tokens}"


@torch.no_grad()
def realise_circulants(module: TracedModule) -> tuple[TracedModule, Record]:
    """Put a `DenseTokenMixer` in the place of every `CirculantMixer`; `module` owns its parameters."""
    count = 0
    for path, part in list(module.named_modules()):
        if isinstance(part, CirculantMixer):
            parent, _, name = path.rpartition(".")
            mixer = DenseTokenMixer(dense_circulant(part.weight)).train(part.training)
            module.get_submodule(parent)._modules[name] = mixer
            count += 1
    return module, Record(count, f"{count} as matrix products" if count else "")
