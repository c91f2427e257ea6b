"""The statistics network: its size, its pairs, and the gradient that turns on its way to the tokens."""

from __future__ import annotations

import pytest
import torch

from vmkd_fx.errors import ModelError, RecipeError, TrainingError, UnknownNameError
from vmkd_fx.passes.heads import StatisticsNetwork, derangement, reverse_gradient


def test_the_papers_size() -> None:
    """0.84 M parameters: both teachers' pairs at CycleMLP's last stage, 2 x (512 + 49) long."""
    network = StatisticsNetwork([(512, 49), (512, 49)])
    assert sum(p.numel() for p in network.parameters()) == 838_145


@pytest.mark.parametrize("batch", [2, 3, 7, 64])
def test_no_pair_stays(batch: int) -> None:
    torch.manual_seed(batch)
    drawn = [derangement(batch) for _ in range(20)]
    for order in [*drawn, derangement(batch, random=False)]:
        assert order.sort().values.tolist() == list(range(batch))
        assert (order != torch.arange(batch)).all()
    if batch > 2:
        assert len({tuple(order.tolist()) for order in drawn}) > 1


def test_unpaired_means_another_images_channel_tokens() -> None:
    torch.manual_seed(0)
    network = StatisticsNetwork([(3, 2), (4, 1)], hidden=8)
    tokens = [torch.randn(3, 5), torch.randn(3, 5)]
    partners = torch.tensor([2, 0, 1])
    joint, marginal = network(tokens, partners)
    spatial = torch.cat([tokens[0][:, :3], tokens[1][:, :4]], 1)
    channel = torch.cat([tokens[0][:, 3:], tokens[1][:, 4:]], 1)
    torch.testing.assert_close(joint, network.layers(torch.cat([spatial, channel], 1))[:, 0])
    torch.testing.assert_close(marginal, network.layers(torch.cat([spatial, channel[partners]], 1))[:, 0])


def test_pairs_are_drawn_in_training_and_fixed_in_eval() -> None:
    torch.manual_seed(1)
    network = StatisticsNetwork([(3, 2)], hidden=8)
    tokens = [torch.randn(16, 5)]
    assert not torch.equal(network(tokens)[1], network(tokens)[1])
    network.eval()
    fixed = network(tokens, derangement(16, random=False))[1]
    assert torch.equal(network(tokens)[1], fixed)
    third_party = StatisticsNetwork([(3, 2)], hidden=8, variant="third_party")
    third_party.load_state_dict(network.state_dict())
    assert torch.equal(third_party(tokens)[1], fixed)


def test_the_gradient_turns_and_the_value_stays() -> None:
    x = torch.randn(100, requires_grad=True)
    turned = reverse_gradient(x, 0.25)
    assert torch.equal(turned, x)
    turned.sum().backward()
    assert torch.equal(x.grad, torch.full((100,), -0.25))


def test_statistics_are_float32_under_autocast_and_follow_half_weights() -> None:
    network = StatisticsNetwork([(3, 2)], hidden=8)
    tokens = torch.randn(4, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network([tokens])[0].dtype == torch.float32
    assert network.bfloat16()([tokens])[0].dtype == torch.bfloat16


def test_refusals() -> None:
    with pytest.raises(TrainingError, match="the batch has 1"):
        StatisticsNetwork([(3, 2)], hidden=8)([torch.randn(1, 5)])
    with pytest.raises(RecipeError, match="spatial and channel tokens"):
        StatisticsNetwork([(3, 0)])
    with pytest.raises(RecipeError, match="cannot be averaged"):
        StatisticsNetwork([(3, 2), (4, 1)], variant="third_party")
    with pytest.raises(UnknownNameError, match="did you mean 'third_party'"):
        StatisticsNetwork([(3, 2)], variant="thirdparty")
    with pytest.raises(ModelError, match=r"got lengths \[6\]"):
        StatisticsNetwork([(3, 2)])([torch.randn(4, 6)])
