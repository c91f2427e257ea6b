"""A statistic over the batch of all processes that train together, exact in value and in gradient.

DistributedDataParallel takes the mean of the processes' gradients. That is the gradient of a loss over the
joined batch if the loss is a mean over samples. Mutual information is not: its second term is the log of a
mean, and its pairs are drawn across the batch. So every process computes it on the joined batch, from its own
tokens and from copies of the others'. With V the same number in each of W processes, the mean of gradients is

    with respect to weights behind the joined batch:  (1/W) Σ_r ∂V/∂θ  =  ∂V/∂θ
    with respect to weights before it:                (1/W) Σ_r c ∂V/∂tokens_r ∂tokens_r/∂φ

which is ∂V/∂φ for c = W. So a process's own tokens pass their gradient on W times, and nothing has to be sent
in the backward pass.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def processes() -> int:
    """How many processes train together; 1 where nobody started several."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def of_all(x: torch.Tensor) -> list[torch.Tensor]:
    """`x` of every process, in the order of ranks, without gradients; equal shapes everywhere."""
    found = [torch.empty_like(x) for _ in range(processes())]
    dist.all_gather(found, x.detach().contiguous())
    return found


def joined_batch(x: torch.Tensor) -> torch.Tensor:
    """The parts (B, ...) of W processes as one batch (W B, ...); the gradient of the own part counts W times.

    Every process must ask, with as many samples as the others. A single process gets `x` itself.
    """
    count = processes()
    if count == 1:
        return x
    parts, rank = of_all(x), dist.get_rank()
    # x to the bit, with the gradient of W x.
    parts[rank] = parts[rank] + (x - x.detach()) * count
    return torch.cat(parts)
