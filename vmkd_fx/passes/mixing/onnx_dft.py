"""The circulant map by ONNX's DFT operator, where the runtime has one.

ONNX Runtime has it on the CPU, slow and in single precision; TensorRT since 11.2; TensorRT-RTX has none. The
graph keeps one `vmkd::dft_filter`, which the export writes as ONNX operators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vmkd_fx.passes.mixing import operators  # noqa: F401  (registers the operator)
from vmkd_fx.passes.mixing.problem import Cost, Realisation, to_channels
from vmkd_fx.passes.mixing.real_fft import spectrum, transform_cost

_TENSORRT_HAS_IT = (11, 2)


@dataclass(frozen=True)
class OnnxDFT(Realisation):
    """Transforms by the runtime's own operator."""

    @property
    def name(self) -> str:
        return "onnx-dft"

    def prepare(self, kernel: Tensor) -> tuple[Tensor, ...]:
        """The one-sided response (..., C, 2) as factors of re and im, and of the two exchanged."""
        width = self.problem.grid[-1]
        frequency = torch.arange(width // 2 + 1)
        twice = torch.where((frequency == 0) | (2 * frequency == width), 1.0, 2.0).to(kernel.dtype)
        response = to_channels(spectrum(kernel) * twice, self.problem)
        direct = torch.stack([response.real, response.real], -1)
        return direct, torch.stack([-response.imag, response.imag], -1)

    def apply(self, x: Tensor, *constants: Tensor) -> Tensor:
        found: Tensor = torch.ops.vmkd.dft_filter(x, *constants)
        return found

    def fits(self, kind: str, version: tuple[int, int] | None = None) -> str | None:
        if kind == "torch":
            return "torch computes 'real-fft' instead, which is the same without the operator"
        if kind == "tensorrt-rtx":
            return "TensorRT-RTX has no DFT"
        if kind == "tensorrt" and (version is None or version < _TENSORRT_HAS_IT):
            found = "of an unknown version" if version is None else ".".join(map(str, version))
            return f"TensorRT has a DFT since 11.2, and this one is {found}"
        return super().fits(kind, version)

    def cost(self) -> Cost:
        cost = transform_cost(self.problem, self.problem.channels)
        return replace(
            cost,
            moved=cost.moved + 2 * self.problem.elements,
            constants=2 * cost.constants,
            operators=6 + 3 * len(self.problem.grid),
        )
