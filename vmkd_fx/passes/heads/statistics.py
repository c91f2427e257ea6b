"""The statistics network of the mutual information between spatial and channel tokens (STD section 3.2).

ψ(T_S, T_C) of Eq. 8 is a perceptron of three layers, 512 wide, on the concatenated tokens. Algorithm 1 climbs
V(θ) with the network and descends it with the tokens: behind `reverse_gradient` both are one backward pass of
-V (Eq. 9).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vmkd_fx.errors import ModelError, RecipeError, TrainingError, UnknownNameError
from vmkd_fx.passes.heads.full_precision import in_full_precision
from vmkd_fx.passes.heads.joined import joined_batch, of_all, processes

VARIANTS = ("paper", "third_party")


def reverse_gradient(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """x itself, bit for bit, with a gradient of -scale instead of 1; x must be finite."""
    fixed = x.detach()
    return fixed + (fixed - x) * scale


def derangement(batch: int, device: torch.device | str | None = None, random: bool = True) -> torch.Tensor:
    """A permutation (batch,) that leaves nothing where it is: a random cycle through the batch, or a step by
    one, i to i + 1.

    Raises:
        TrainingError: a single sample has no partner.
    """
    if batch < 2:
        raise TrainingError(
            f"mutual information needs pairs from two images, the batch has {batch}; "
            "give at least 2 images a process and drop the last, smaller batch (drop_last=True)"
        )
    step = torch.arange(1, batch + 1, device=device) % batch
    if not random:
        return step
    order = torch.rand(batch, device=device).argsort()
    return torch.empty_like(order).scatter(0, order, order[step])


class StatisticsNetwork(nn.Module):
    """ψ on paired tokens and on unpaired ones: the two samples of Eq. 9.

    Tokens arrive as [T_S || T_C] (B, S + C), one tensor a teacher. The activation is not in the paper; it is
    GELU as in the token MLPs.

    Args:
        sizes: (S, C) of each teacher's tokens: the student's channels and its patches. Three layers on all of
            them, hidden wide.
        hidden: 512 in the paper.
        variant: "paper" concatenates the teachers' tokens (that gives the paper's 0.84 M parameters) and
            draws a derangement at each call in train(); "third_party" averages them, and pairs sample i with
            i + 1, as github.com/devrimcavusoglu/std does. In eval() both step by one.
        reversal: how much of the turned gradient reaches the tokens: with 1 they descend V as fast as the
            network climbs it. None leaves the gradient as it is.

    Raises:
        RecipeError: tokens of one kind alone share no information that could be measured, or the teachers'
            tokens are to be averaged and differ in length.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        hidden: int = 512,
        variant: str = "paper",
        reversal: float | None = 1.0,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise UnknownNameError("variant", variant, VARIANTS)
        sizes = [(int(spatial), int(channel)) for spatial, channel in sizes]
        if not sizes or any(min(size) < 1 for size in sizes):
            raise RecipeError(
                f"mutual information needs spatial and channel tokens of each teacher, got lengths {sizes}; "
                "leave the regularisation out for tokens of one kind"
            )
        if variant == "third_party" and len(set(sizes)) > 1:
            raise RecipeError(f"tokens of lengths {sizes} cannot be averaged; use variant='paper'")
        self.sizes, self.variant, self.reversal = tuple(sizes), variant, reversal
        used = sizes[:1] if variant == "third_party" else sizes
        self.layers = nn.Sequential(
            nn.Linear(sum(map(sum, used)), hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, 1),
        )

    @in_full_precision
    def forward(
        self, tokens: Sequence[torch.Tensor], partners: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each teacher's tokens (B, S + C) to ψ on pairs (B,) and on unpaired tokens (B,).

        Where W processes train together, B is their joined batch in the result and in `partners`, and every
        process gets the same numbers: see `vmkd_fx.passes.heads.joined`.

        Args:
            partners: (B,), whose channel tokens each sample's spatial tokens meet; None draws a derangement,
                that of process 0 in all of them.

        Raises:
            TrainingError: the batch has one sample.
            ModelError: the tokens are not as long as `sizes` says.
        """
        several = self.training and processes() > 1
        spatial, channel = self._split([joined_batch(token) for token in tokens] if several else tokens)
        if partners is None:
            drawn = self.training and self.variant == "paper"
            partners = derangement(len(spatial), spatial.device, drawn)
            partners = of_all(partners)[0] if several else partners
        pairs = torch.cat([spatial, channel], 1), torch.cat([spatial, channel[partners]], 1)
        # Weights in half precision, without autocast, take the tokens as they are.
        both = torch.cat(pairs).to(next(self.layers.parameters()).dtype)
        joint, marginal = self.layers(both).squeeze(1).chunk(2)
        return joint, marginal

    def _split(self, tokens: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """All spatial and all channel tokens, (B, sum S) and (B, sum C), or their means over the teachers."""
        found = [token.shape[1] for token in tokens]
        if found != [sum(size) for size in self.sizes]:
            raise ModelError(f"the statistics network was made for tokens {self.sizes}, got lengths {found}")
        if self.reversal is not None:
            tokens = [reverse_gradient(token, self.reversal) for token in tokens]
        split = [token.split(size, 1) for token, size in zip(tokens, self.sizes, strict=True)]
        spatial, channel = ([pair[i] for pair in split] for i in (0, 1))
        if self.variant == "third_party":
            return torch.stack(spatial).mean(0), torch.stack(channel).mean(0)
        return torch.cat(spatial, 1), torch.cat(channel, 1)
