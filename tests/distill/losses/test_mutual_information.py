"""Mutual information: its value, its corrected gradient, and an estimate that can be known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from vmkd_fx.distill.losses import MutualInformationLoss, mutual_information
from vmkd_fx.errors import ModelError, RecipeError
from vmkd_fx.passes.heads import StatisticsNetwork


def test_equation_9() -> None:
    joint, marginal = torch.randn(2, 6, dtype=torch.float64)
    expected = joint.mean() - marginal.exp().mean().log()
    torch.testing.assert_close(mutual_information(joint, marginal), expected)
    torch.testing.assert_close(MutualInformationLoss()(joint, marginal), -expected)


def test_without_correction_the_gradient_is_that_of_equation_9() -> None:
    joint, marginal = torch.randn(2, 6, dtype=torch.float64).unbind(0)
    joint.requires_grad_()
    marginal.requires_grad_()
    expected = torch.autograd.grad(-mutual_information(joint, marginal), [joint, marginal])
    uncorrected, evaluated, first = (
        MutualInformationLoss(None),
        MutualInformationLoss(0.9).eval(),
        MutualInformationLoss(0.9),
    )
    for loss in (uncorrected, evaluated, first):
        found = torch.autograd.grad(loss(joint, marginal), [joint, marginal])
        torch.testing.assert_close(found, expected)
    assert evaluated.log_average == -math.inf


def test_the_correction_divides_by_the_moving_average() -> None:
    loss = MutualInformationLoss(0.75).double()
    batches = torch.randn(3, 5, dtype=torch.float64)
    average = batches[0].exp().mean()
    loss(batches[0], batches[0])
    for batch in batches[1:]:
        marginal = batch.clone().requires_grad_()
        (found,) = torch.autograd.grad(loss(batch, marginal), marginal)
        average = 0.75 * average + 0.25 * batch.exp().mean()
        torch.testing.assert_close(found, batch.exp() / 5 / average)
        torch.testing.assert_close(loss.log_average.exp(), average)


def test_the_average_is_part_of_the_state() -> None:
    loss, resumed = MutualInformationLoss(), MutualInformationLoss()
    loss(torch.randn(4), torch.randn(4))
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed.log_average, loss.log_average)


def test_large_statistics_neither_overflow_nor_outweigh() -> None:
    """A share is at most 1 / (1 - decay), because the batch is in its own average."""
    loss = MutualInformationLoss(0.99)
    loss(torch.zeros(4), torch.zeros(4))
    marginal = torch.tensor([1e4, 0.0, -1e4, 5.0], requires_grad=True)
    value = loss(torch.zeros(4), marginal)
    (grad,) = torch.autograd.grad(value, marginal)
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()
    assert 99 < grad.max() < 101


def test_the_network_learns_the_information_of_correlated_gaussians() -> None:
    """Two Gaussians of correlation 0.9 share -log(1 - 0.81) / 2 = 0.83 nats, independent ones none."""
    torch.manual_seed(0)
    network, loss = StatisticsNetwork([(1, 1)], hidden=32, reversal=None), MutualInformationLoss(0.9)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)

    def drawn(count: int, correlation: float) -> torch.Tensor:
        x, noise = torch.randn(2, count, 1)
        return torch.cat([x, correlation * x + math.sqrt(1 - correlation**2) * noise], 1)

    for _ in range(300):
        optimizer.zero_grad()
        loss(*network([drawn(256, 0.9)])).backward()
        optimizer.step()
    with torch.no_grad():
        found = mutual_information(*network([drawn(4096, 0.9)]))
        independent = mutual_information(*network([drawn(4096, 0.0)]))
    assert 0.65 < found < 0.9
    assert independent < 0.05


def test_one_backward_pass_climbs_with_the_network_and_descends_with_the_tokens() -> None:
    torch.manual_seed(1)
    partners = torch.tensor([1, 2, 3, 0])
    tokens = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    plain = StatisticsNetwork([(4, 3)], hidden=16, reversal=None).double()
    reversed_ = StatisticsNetwork([(4, 3)], hidden=16, reversal=0.5).double()
    reversed_.load_state_dict(plain.state_dict())
    value = mutual_information(*plain([tokens], partners))
    expected = torch.autograd.grad(value, [tokens, *plain.parameters()])
    loss = MutualInformationLoss(None)(*reversed_([tokens], partners))
    found = torch.autograd.grad(loss, [tokens, *reversed_.parameters()])
    torch.testing.assert_close(found[0], 0.5 * expected[0])
    torch.testing.assert_close(list(found[1:]), [-grad for grad in expected[1:]])


def test_it_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    network, loss = StatisticsNetwork([(4, 3)], hidden=16), MutualInformationLoss()

    def step(tokens: torch.Tensor) -> torch.Tensor:
        return loss(*network([tokens]))

    tokens = torch.randn(5, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = torch.compile(step, fullgraph=True, backend="aot_eager")(tokens)
    value.backward()
    assert value.dtype == torch.float32
    assert tokens.grad is not None
    assert torch.isfinite(loss.log_average)


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="below 1"):
        MutualInformationLoss(1.0)
    with pytest.raises(ModelError, match=r"\(4, 1\)"):
        mutual_information(torch.zeros(4, 1), torch.zeros(4))
