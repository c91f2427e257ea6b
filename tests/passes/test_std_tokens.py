"""STD's tokens go in, train, and come out without a trace."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from tests.checks import assert_is, assert_same_module, fingerprint
from tests.models import images, small
from vmkd_fx.errors import MatchError, ReceiptError, RecipeError, UnknownNameError
from vmkd_fx.graph.receipt import Receipt
from vmkd_fx.graph.shapes import multiply_adds, parameter_count
from vmkd_fx.graph.trace import trace
from vmkd_fx.passes.std_tokens import StdConfig, inject_std_tokens

TWO = StdConfig(positions=("2/3", -1))
FAMILIES = ("mixer", "resmlp", "gmlp", "deit", "poolformer")


@pytest.mark.parametrize(
    ("name", "parameters", "operations"),
    [("mixer_s16_224", 22.163, 4.2535), ("mixer_b16_224", 66.708, 13.670), ("resmlp_24_224", 32.452, 6.226)],
)
def test_sizes_of_std_table_2(name: str, parameters: float, operations: float) -> None:
    """Two teachers at the last block, K = 1, 1000 classes; millions of parameters and billions of
    multiply-adds.
    """
    module = inject_std_tokens(vx.trace(timm.create_model(name)), StdConfig(positions=(-1, -1)))
    assert parameter_count(module) / 1e6 == pytest.approx(parameters, abs=5e-4)
    assert multiply_adds(module, module.info.need_input_size()) / 1e9 == pytest.approx(operations, rel=2e-4)


@pytest.mark.parametrize("name", ["mixer_s16_224", "resmlp_12_224", "gmlp_ti16_224", "deit_tiny_patch16_224"])
def test_strip_of_wrap_is_the_model(name: str) -> None:
    model = timm.create_model(name)
    task = vx.wrap(model, "std", teachers=[_constant_teacher(1000)])
    assert_is(vx.strip(task), model, images(1, 224))


@pytest.mark.parametrize("family", FAMILIES)
def test_strip_of_wrap_is_the_model_before_and_after_training(family: str) -> None:
    model = small(family)
    module = inject_std_tokens(vx.trace(model), TWO).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = images(4, vx.trace(model).info.need_input_size()[1])
    assert_is(vx.strip(module), model, x)

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        sum(value.square().mean() for value in module(x).values()).backward()
        optimizer.step()

    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters()), (
        "training reached the model"
    )
    assert_is(vx.strip(module), model, x)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_see_the_block_and_the_block_does_not_see_the_heads(family: str) -> None:
    model = small(family).eval()
    module = inject_std_tokens(vx.trace(model), TWO).eval()
    x = images(3, module.info.need_input_size()[1])
    outputs = module(x)
    assert list(outputs) == ["logits", "std/0", "std/1"]
    assert torch.equal(outputs["logits"], model(x))
    assert all(outputs[f"std/{i}"].shape == (3, 10) for i in (0, 1))

    outputs["std/0"].sum().backward()
    reached = {
        name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and "block" in name
    }
    last = vx.anatomy(model).blocks[-1].path.split(".")[1]
    assert reached and last not in reached, "two thirds of two blocks is the first"


def test_the_tokens_are_equations_5_and_6() -> None:
    """Against a plain transcription: every channel's patches and the token through W1, σ, W2, and the same
    across channels.
    """
    module = inject_std_tokens(vx.trace(small("mixer")), StdConfig(blocks=2)).double().eval()
    tokens = module.get_submodule("vmkd.std.teacher_0.tokens")
    for parameter in tokens.parameters():
        nn.init.normal_(parameter, std=0.5)
    z = torch.randn(2, 16, 24, dtype=torch.float64)
    expected = []
    for image in z:
        spatial, channel = tokens.spatial[0], tokens.channel[:, 0]
        for block in tokens.blocks:
            patches = block.norm_spatial(torch.cat([image, spatial[None]]))
            channels = block.norm_channel(torch.cat([image, channel[:, None]], dim=1))
            step_s = torch.stack([_two_layers(block.mlp_spatial, patches[:, j]) for j in range(24)])
            step_c = torch.stack([_two_layers(block.mlp_channel, channels[i]) for i in range(16)])
            spatial, channel = spatial + step_s, channel + step_c
        expected.append(torch.cat([spatial, channel]))
    torch.testing.assert_close(tokens(z), torch.stack(expected), rtol=1e-12, atol=1e-12)


def _two_layers(mlp: nn.Module, vector: torch.Tensor) -> torch.Tensor:
    hidden = nn.functional.gelu(mlp.fc1.weight @ vector + mlp.fc1.bias)
    return mlp.fc2.weight[0] @ hidden + mlp.fc2.bias[0]


def test_the_students_keys_are_a_timm_checkpoint() -> None:
    model = small("deit")
    module = inject_std_tokens(vx.trace(model), TWO)
    own = {key: value for key, value in module.state_dict().items() if not key.startswith("vmkd.")}
    assert len(own) < len(module.state_dict())
    small("deit").load_state_dict(own, strict=True)


def test_the_given_model_is_left_alone() -> None:
    model = small("mixer").eval()
    before = fingerprint(model)
    module = inject_std_tokens(vx.trace(model), TWO).train()
    vx.strip(module)
    assert_same_module(model, before)


@pytest.mark.parametrize("predict", ["mean", "dist"])
def test_heads_can_stay_as_the_prediction(predict: str) -> None:
    module = inject_std_tokens(vx.trace(small("mixer")), TWO).eval()
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)
    outputs = module(images())
    dist = (outputs["std/0"] + outputs["std/1"]) / 2
    expected = dist if predict == "dist" else (outputs["logits"] + dist) / 2
    torch.testing.assert_close(vx.strip(module, predict)(images()), expected)


def test_no_heads_no_average() -> None:
    with pytest.raises(MatchError, match="needs distillation heads"):
        vx.strip(small("mixer"), "mean")
    with pytest.raises(UnknownNameError, match="Known: class, dist, mean"):
        vx.strip(small("mixer"), "average")


def test_receipts_come_off_in_reverse_order() -> None:
    model = small("mixer")
    once = inject_std_tokens(vx.trace(model), StdConfig())
    edited = trace(once)
    edited.graph.erase_node(next(n for n in edited.graph.nodes if n.op == "output"))
    edited.graph.output({"logits": next(n for n in edited.graph.nodes if n.name == "head")})
    with pytest.raises(ReceiptError, match="outputs are"):
        vx.strip(edited)


def test_a_receipt_survives_json_deepcopy_and_undo() -> None:
    module = inject_std_tokens(vx.trace(small("mixer")), TWO)
    (receipt,) = module.receipts
    assert Receipt.from_json(receipt.to_json()) == receipt
    assert copy.deepcopy(module).receipts == (receipt,)
    assert vx.strip(copy.deepcopy(module)).code == vx.trace(small("mixer")).code


def test_a_node_read_by_others_is_not_taken_out() -> None:
    module = trace(inject_std_tokens(vx.trace(small("mixer")), StdConfig()))
    head = next(n for n in module.graph.nodes if n.name.endswith("head") and "vmkd" in n.name)
    with module.graph.inserting_after(head):
        module.graph.call_function(torch.relu, (head,))
    with pytest.raises(ReceiptError, match="is read by relu"):
        vx.strip(module)


@pytest.mark.parametrize(
    "settings", [{"positions": ()}, {"blocks": 0}, {"spatial_ratio": 0}, {"channel_ratio": -1}]
)
def test_settings_that_cannot_be(settings: dict) -> None:
    with pytest.raises(RecipeError):
        StdConfig(**settings)


def test_a_block_that_is_not_there() -> None:
    with pytest.raises(MatchError, match="has no block 7: it has 2"):
        inject_std_tokens(vx.trace(small("mixer")), StdConfig(positions=(7,)))


def test_a_student_without_blocks() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(MatchError, match="has no blocks with token features"):
        inject_std_tokens(vx.trace(model, input_size=(3, 32, 32)), StdConfig())


def _constant_teacher(classes: int) -> nn.Module:
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes))
    teacher.num_classes = classes
    return teacher
