"""Proof that a rewritten graph computes what the graph before computed.

The check runs both graphs in float64 on random images, with norm weights, biases and running statistics made
random first: a fresh LayerNorm has weight one and bias zero and would hide a wrong merge.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from vmkd_fx.errors import VerificationError
from vmkd_fx.graph.edit import LOGITS
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import evaluating, image_form, reference_tensor

TOLERANCE = 1e-12
"""Relative, in float64: rounding of a few hundred operations, each good to 1e-16."""

AnyModule = TypeVar("AnyModule", bound=nn.Module)

_FAINT = 0.01
"""Of the deviation that keeps the size of what passes: a matrix below it shows next to nothing of it."""

_SHIFTS = ("bias", "beta", "running_mean")


def relative_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `before`; infinite where either is not
    finite.
    """
    before, after = before.detach(), after.detach()
    if before.shape != after.shape or not bool(torch.isfinite(before).all() and torch.isfinite(after).all()):
        return float("inf")
    scale = float(before.abs().max())
    difference = float((before - after).abs().max())
    return difference / scale if scale else difference


def probe_images(module: TracedModule, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Random images of the model's size: normal (B, C, H, W) in its dtype, or the frames that it takes."""
    reference = reference_tensor(module)
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = image_form(module, module.info.need_input_size())
    if not dtype.is_floating_point:
        return torch.randint(256, (batch, *shape), generator=generator, dtype=dtype).to(reference.device)
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(reference)


def randomise_(module: AnyModule, seed: int = 0) -> AnyModule:
    """Give every per-channel scale, shift and running statistic a random value, in place.

    Scales and variances are uniform in (0.6, 1.4), shifts and means normal with deviation 0.3. Matrices and
    kernels stay, for noise in them makes deep networks overflow; only those that are zero or close to it, as
    fresh heads often are (BEiT's has a thousandth of the usual deviation), become random of deviation one
    over the root of the fan-in, for behind a zero nothing can be seen. Numbers by themselves stay too.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            tensor.data = tensor.data.contiguous()  # an expanded one has no place for each number
            if tensor.ndim > 1 and tensor.numel() != max(tensor.shape):
                fan_in = tensor[0].numel()
                if float(tensor.norm()) <= _FAINT * (tensor.numel() / fan_in) ** 0.5:
                    tensor.copy_(normal(tensor) / fan_in**0.5)
            elif tensor.ndim == 0 and bool(tensor):
                continue
            elif name.rpartition(".")[2] in _SHIFTS:
                tensor.copy_(0.3 * normal(tensor))
            else:
                tensor.copy_(0.6 + 0.8 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    return module


def outputs_of(module: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """All outputs in eval mode by name, a bare tensor as "logits"; the module's own modes stay as they
    are.
    """
    with evaluating(module), torch.no_grad():
        output = module(images)
    return output if isinstance(output, dict) else {LOGITS: output}


def logits_of(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits in eval mode."""
    return outputs_of(module, images)[LOGITS]


def rounding_of(module: nn.Module, images: torch.Tensor, seed: int = 0) -> float:
    """What one unit in the last place of every weight does to the logits, relative.

    Deep networks magnify rounding, so this, and no fixed number, says how well they can be computed.
    """
    generator = torch.Generator().manual_seed(seed)
    noisy = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            signs = 2 * torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) - 1
            noisy[name] = tensor * (1 + torch.finfo(tensor.dtype).eps * signs)
    with evaluating(module), torch.no_grad():
        found = torch.func.functional_call(module, noisy, (images,))
    return relative_error(logits_of(module, images), found)


def check_equal(before: torch.Tensor, after: torch.Tensor, tolerance: float, what: str) -> float:
    """The relative error of `after`, or an error if it is above `tolerance`.

    Raises:
        VerificationError: names what was rewritten, the error and the bound.
    """
    error = relative_error(before, after)
    if not error <= tolerance:
        raise VerificationError(
            f"{what}: the rewritten graph differs from the one before by {error:.3g} relative, "
            f"and at most {tolerance:.3g} is allowed; nothing was changed in the model that was given"
        )
    return error
