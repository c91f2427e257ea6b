"""The mutual information in the student's graph: one backward pass, two directions, one module."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.utils import ModelEmaV3
from torch import nn

import vmkd_fx as vx
from tests.models import images, small
from vmkd_fx.errors import TrainingError
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.heads import StatisticsNetwork, TokenInformation, derangement, mutual_information
from vmkd_fx.passes.std_tokens import StdConfig, inject_std_tokens

OUTPUT = "std/information"
BESIDE = "vmkd.std.information"
TWO = StdConfig(("1/2", -1), information=True)


def measured(config: StdConfig = TWO) -> TracedModule:
    """Without dropout, in float64, and with weights that make ψ differ from image to image."""
    torch.manual_seed(1)
    student = MlpMixer(num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=24)
    module = inject_std_tokens(vx.trace(student, input_size=(3, 32, 32)), config).double().train()
    for name, parameter in module.named_parameters():
        if BESIDE in name:
            nn.init.normal_(parameter, std=0.3)
    return module


def value_of(module: TracedModule, x: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
    """V of Eq. 9 with the module's own weights, no reversal and no correction."""
    tokens: list[torch.Tensor] = []
    handles = [
        module.get_submodule(f"vmkd.std.teacher_{i}.tokens").register_forward_hook(
            lambda _, inputs, output: tokens.append(output)
        )
        for i in (0, 1)
    ]
    module(x)
    for handle in handles:
        handle.remove()
    network = module.get_submodule(f"{BESIDE}.network")
    network.reversal = None
    value = mutual_information(*network(tokens, partners))
    network.reversal = 1.0
    return value


def test_one_backward_pass_is_ascent_for_the_network_and_descent_for_the_student() -> None:
    """Against a backward pass of V for each; the first batch is its own moving average."""
    module, x = measured(), images(6, dtype=torch.float64)
    names = [name for name, p in module.named_parameters()]
    torch.manual_seed(2)
    found = dict(zip(names, gradients(module, module(x)[OUTPUT]), strict=True))
    torch.manual_seed(2)
    partners = derangement(6)
    ascent, descent = (
        dict(zip(names, gradients(module, value_of(module, x, partners)), strict=True)) for _ in range(2)
    )

    network = [name for name in names if BESIDE in name]
    tokens = [name for name in names if "tokens" in name]
    blocks = [name for name in names if name.startswith("blocks.0")]
    assert network
    assert tokens
    assert blocks
    for name in network:
        torch.testing.assert_close(found[name], -ascent[name], rtol=1e-10, atol=1e-14)
    for name in names:
        if BESIDE not in name:
            torch.testing.assert_close(found[name], descent[name], rtol=1e-10, atol=1e-14)
    assert all(any(found[name].abs().max() > 1e-6 for name in part) for part in (network, tokens, blocks))


def gradients(module: nn.Module, value: torch.Tensor) -> list[torch.Tensor]:
    return list(
        torch.autograd.grad(value, list(module.parameters()), allow_unused=True, materialize_grads=True)
    )


def test_two_steps_of_one_optimiser_move_v_both_ways() -> None:
    """A step of the network alone raises V, a step of the student alone lowers it, from one gradient."""
    x = images(6, dtype=torch.float64)
    moved = {}
    for part in ("network", "student"):
        module = measured()
        torch.manual_seed(2)
        module(x)[OUTPUT].backward()
        torch.manual_seed(2)
        partners = derangement(6)
        before = value_of(module, x, partners)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.grad is not None and (BESIDE in name) == (part == "network"):
                    parameter -= 1e-4 * parameter.grad
        moved[part] = float((value_of(module, x, partners) - before).detach())
    assert moved["network"] > 1e-9
    assert moved["student"] < -1e-9


def test_heads_and_labels_get_nothing_of_it() -> None:
    module = measured()
    module(images(4, dtype=torch.float64))[OUTPUT].backward()
    without = {name.split(".")[-2] for name, p in module.named_parameters() if p.grad is None}
    assert without == {"head", "norm"}, "the heads, and what lies behind the last block"


def test_the_value_is_that_of_the_tokens() -> None:
    module, x = measured(), images(6, dtype=torch.float64)
    torch.manual_seed(2)
    found = module(x)[OUTPUT]
    torch.manual_seed(2)
    torch.testing.assert_close(found, -value_of(module, x, derangement(6)))
    assert found.shape == ()


def test_evaluation_needs_no_partner() -> None:
    module = measured().eval()
    outputs = module(images(1, dtype=torch.float64))
    assert torch.equal(outputs[OUTPUT], torch.zeros((), dtype=torch.float64))
    assert int(module.get_submodule(f"{BESIDE}.loss").batches) == 0
    half = TokenInformation([(3, 2)]).half().eval()(torch.zeros(1, 5, dtype=torch.float16))
    assert half.dtype == torch.float32


def test_one_image_in_training_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"the batch has 1; give at least 2 images.*drop_last=True"):
        measured()(images(1, dtype=torch.float64))


def test_the_moving_average_is_a_buffer_of_the_student() -> None:
    module = measured()
    loss = module.get_submodule(f"{BESIDE}.loss")
    assert loss.log_average == -torch.inf
    for _ in range(2):
        module(images(4, dtype=torch.float64))
    saved = module.state_dict()
    assert saved[f"{BESIDE}.loss.batches"] == 2
    again = measured()
    again.load_state_dict(saved)
    assert torch.equal(again.get_submodule(f"{BESIDE}.loss").log_average, loss.log_average)
    assert torch.isfinite(loss.log_average)


def test_averaged_weights_stay_finite() -> None:
    """A start at -inf would make NaN of every average that begins before the first batch."""
    module = measured()
    ema = ModelEmaV3(module, decay=0.9)
    for _ in range(3):
        module(images(4, dtype=torch.float64))
        ema.update(module)
    values = ema.module.state_dict()
    assert all(torch.isfinite(value).all() for value in values.values())
    assert values[f"{BESIDE}.loss.batches"] == 3


def test_it_is_single_precision_under_autocast() -> None:
    module = inject_std_tokens(vx.trace(small("mixer")), TWO).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = module(images(4))
    assert outputs["std/0"].dtype == torch.bfloat16
    assert outputs[OUTPUT].dtype == torch.float32
    assert torch.isfinite(outputs[OUTPUT])


@pytest.mark.slow
def test_it_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    module, x = measured(), images(4, dtype=torch.float64)
    twin = measured()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        sums = []
        for run in (compiled, twin):
            torch.manual_seed(2)
            sums.append(sum(value.sum() for value in run(x).values()))
            sums[-1].backward()
        torch.testing.assert_close(*sums, rtol=1e-12, atol=1e-12)
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-14)
    loss = module.get_submodule(f"{BESIDE}.loss")
    torch.testing.assert_close(loss.average, twin.get_submodule(f"{BESIDE}.loss").average)


def test_teachers_at_blocks_of_other_sizes() -> None:
    """The network takes each pair at its own length: channels and patches of two stages."""
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=10)
    module = inject_std_tokens(vx.trace(model, input_size=(3, 64, 64)), TWO).train()
    network = module.get_submodule(f"{BESIDE}.network")
    assert isinstance(network, StatisticsNetwork)
    assert network.sizes == ((16, 64), (32, 4))
    assert torch.isfinite(module(images(4, 64))[OUTPUT])


def test_strip_takes_it_out() -> None:
    model = small("mixer")
    module = inject_std_tokens(vx.trace(model), TWO).train()
    module(images(4))[OUTPUT].backward()
    assert list(vx.strip(module).state_dict()) == list(model.state_dict())
