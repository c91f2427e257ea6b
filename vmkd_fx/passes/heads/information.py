"""Mutual information between spatial and channel tokens, estimated by a network, as a loss (STD Eq. 7 to 9,
Algorithm 1; MINE, Belghazi et al., 2018).

    V(θ) = mean ψ(T_S, T_C) - log mean exp ψ(T_S, T̄_C)                       (Eq. 9)

ψ is `StatisticsNetwork`, which also pairs and unpairs the tokens. V is a lower bound that the network raises
and the tokens lower. Its second gradient, E[∇ψ exp ψ] / E[exp ψ], is biased in a small batch, because both
expectations come from it; the denominator is therefore a moving average over batches (MINE section 3.2).

It is a head and no mere loss, because the network learns: as part of the student's graph it is seen by
DistributedDataParallel, EMA and checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from vmkd_fx.errors import ModelError, RecipeError
from vmkd_fx.passes.heads.full_precision import in_full_precision
from vmkd_fx.passes.heads.statistics import StatisticsNetwork

DECAY = 0.99
"""Of the moving average; the paper says neither this nor that there is one."""


@in_full_precision
def mutual_information(joint: torch.Tensor, marginal: torch.Tensor) -> torch.Tensor:
    """V of Eq. 9 in nats: ψ on pairs (B,) and on unpaired tokens (B,) to a scalar."""
    _check(joint, marginal)
    return joint.mean() - log_mean_exp(marginal)


def log_mean_exp(x: torch.Tensor) -> torch.Tensor:
    """log mean exp of (B,), a scalar, without overflow."""
    return x.logsumexp(0) - math.log(x.shape[0])


class MutualInformationLoss(nn.Module):
    """-V, which the network and, behind the gradient reversal in it, the tokens share: one backward pass
    makes the network climb V and the tokens descend it (Algorithm 1, lines 6 and 7).

    (B,), (B,) to a scalar, whose value is -V of this batch. In train() its gradient has the bias corrected;
    the average is kept in two buffers, in the log so that no ψ overflows.

    Args:
        decay: of the moving average of mean exp ψ; None leaves the gradient of Eq. 9 as it is.
    """

    average: torch.Tensor
    batches: torch.Tensor

    def __init__(self, decay: float | None = DECAY) -> None:
        super().__init__()
        if decay is not None and not 0 <= decay < 1:
            raise RecipeError(f"the moving average's decay must be from 0 to below 1, got {decay!r}")
        self.decay = decay
        # A finite start and a count, not -inf: averaging weights over -inf gives NaN.
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def log_average(self) -> torch.Tensor:
        """The log of the moving average, a scalar; -inf before the first batch."""
        return torch.where(self.batches > 0, self.average, -math.inf)

    @in_full_precision
    def forward(self, joint: torch.Tensor, marginal: torch.Tensor) -> torch.Tensor:
        value = mutual_information(joint, marginal)
        if self.decay is None or not self.training:
            return -value
        average = self._update(log_mean_exp(marginal.detach()))
        shares = (marginal.detach() - average - math.log(marginal.shape[0])).exp()
        corrected = joint.mean() - (shares * marginal).sum()
        return corrected.detach() - value.detach() - corrected

    def _update(self, batch: torch.Tensor) -> torch.Tensor:
        """The log of the moving average with this batch in it; the first batch is its own average."""
        assert self.decay is not None
        after = batch
        if self.decay > 0:
            before = self.average.to(batch.dtype)
            mixed = torch.logaddexp(before + math.log(self.decay), batch + math.log(1 - self.decay))
            after = torch.where(self.batches > 0, mixed, batch)
        self.average.copy_(after)
        self.batches.add_(1)
        return after


class TokenInformation(nn.Module):
    """The information that spatial and channel tokens share, as a loss that disentangles them.

    The value is -V; minimising it raises V by the network and lowers V by the tokens, and by the student
    behind them. In eval() it is 0, for one image has no partner.

    Args:
        sizes: (S, C) of each teacher's tokens, see `StatisticsNetwork`.
        hidden: width of the network, 512 in the paper.
        variant: "third_party" averages the teachers' tokens, and its gradient stays as Eq. 9 gives it.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], hidden: int = 512, variant: str = "paper") -> None:
        super().__init__()
        self.network = StatisticsNetwork(sizes, hidden, variant)
        self.loss = MutualInformationLoss(DECAY if variant == "paper" else None)

    def forward(self, *tokens: torch.Tensor) -> torch.Tensor:
        """Each teacher's [T_S || T_C] (B, S + C) to a scalar, in float32 at least.

        Raises:
            TrainingError: a single image in train().
        """
        if self.training:
            value: torch.Tensor = self.loss(*self.network(tokens))
            return value
        dtype = torch.promote_types(tokens[0].dtype, torch.float32)
        return torch.zeros((), dtype=dtype, device=tokens[0].device)


def _check(joint: torch.Tensor, marginal: torch.Tensor) -> None:
    if joint.ndim != 1 or joint.shape != marginal.shape:
        raise ModelError(
            "one value of the statistics network a sample is needed, (B,) on pairs and (B,) on unpaired "
            f"tokens, got {tuple(joint.shape)} and {tuple(marginal.shape)}"
        )
