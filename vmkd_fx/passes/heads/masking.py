"""Random masks over tokens with a fixed number of kept tokens (ViTKD section 3.2).

Eq. 2 masks every token with probability λ; the authors' code keeps int(N (1 - λ)) tokens, those with the
smallest noise. Here it is the latter: every sample then has equally many masked tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vmkd_fx.errors import RecipeError


class TokenMask(NamedTuple):
    """Which tokens are masked.

    Attributes:
        mask: (B, N), 1 where a token is masked, 0 where it is kept, in the noise's dtype.
        restore: (B, N), the rank of each token's noise.
        masked: (B, N - kept), the indices of the masked tokens in the order of their noise.
    """

    mask: torch.Tensor
    restore: torch.Tensor
    masked: torch.Tensor


def kept_tokens(tokens: int, ratio: float) -> int:
    """How many of N tokens a mask ratio λ keeps: int(N (1 - λ)), as the authors' code rounds.

    Raises:
        RecipeError: all of them, or none: there is nothing to generate, or nothing to generate it from.
    """
    kept = int(tokens * (1 - ratio)) if 0 <= ratio <= 1 else -1
    if 0 < kept < tokens:
        return kept
    found = {-1: "is no share of the tokens", 0: "leaves no token"}.get(kept, "masks none")
    advice = (
        f"a ratio from {1 / tokens:.3g} to {1 - 1 / tokens:.3g} does both"
        if tokens > 2
        else "with so few tokens there is nothing to choose; the paper's ratio is 0.5"
    )
    raise RecipeError(f"a mask ratio of {ratio} on {tokens} tokens {found}; {advice}")


def token_mask(noise: torch.Tensor, kept: int) -> TokenMask:
    """The mask that keeps the `kept` tokens of the smallest noise (B, N)."""
    order = noise.argsort(dim=1)
    restore = order.argsort(dim=1)
    return TokenMask((restore >= kept).to(noise.dtype), restore, order[:, kept:])
