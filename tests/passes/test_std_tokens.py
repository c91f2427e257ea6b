"""STD's tokens go in, train, and come out without a trace."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import nn

import vmkd_fx as vx
import vmkd_fx.models.cycle_mlp  # timm's decorator registers on import
from tests.checks import assert_is, assert_same_module, fingerprint
from tests.models import images, small
from tests.slow import rest_slow
from vmkd_fx.errors import MatchError, ReceiptError, RecipeError, UnknownNameError
from vmkd_fx.graph.receipt import Receipt
from vmkd_fx.graph.shapes import multiply_adds, parameter_count
from vmkd_fx.graph.trace import trace
from vmkd_fx.passes.std_tokens import StdConfig, inject_std_tokens

TWO = StdConfig(positions=("2/3", -1))
FAMILIES = ("mixer", "resmlp", "gmlp", "deit", "poolformer")


def of_table_2(name: str) -> nn.Module:
    """A student of table 2 without memory; timm's big ResMLP has patches of 8 pixels, the paper's of 16."""
    big = {"patch_size": 16, "num_blocks": 24, "embed_dim": 768, "mlp_ratio": 4, "norm_layer": Affine}
    with torch.device("meta"):
        if name == "resmlp_b24":
            return MlpMixer(block_layer=partial(ResBlock, init_values=1e-6), **big)
        return timm.create_model(name)


@pytest.mark.parametrize(
    ("name", "parameters", "operations", "printed"),
    rest_slow(
        [
            ("mixer_s16_224", 22.163, 4.2535, (22.2, 4.3)),
            ("mixer_b16_224", 66.708, 13.670, (66.7, 13.7)),
            ("resmlp_24_224", 32.452, 6.226, (32.5, 6.2)),
            ("resmlp_b24", 122.565, 24.070, (122.6, 24.1)),
            ("cycle_mlp_b1", 18.421, 2.249, (18.4, 2.2)),
            ("cycle_mlp_b2", 30.068, 4.008, (30.1, 4.0)),
        ],
        2,
    ),
)
def test_sizes_of_std_table_2(
    name: str, parameters: float, operations: float, printed: tuple[float, float]
) -> None:
    """Two teachers at the last block, K = 1, 1000 classes; millions of parameters and billions of
    multiply-adds, and both as the paper prints them.
    """
    size = (3, 224, 224)
    module = inject_std_tokens(vx.trace(of_table_2(name), input_size=size), StdConfig(positions=(-1, -1)))
    found = parameter_count(module) / 1e6, multiply_adds(module, size) / 1e9
    assert found == pytest.approx((parameters, operations), rel=2e-4)
    assert (round(found[0], 1), round(found[1], 1)) == printed


def test_the_size_of_the_statistics_network() -> None:
    """1122 -> 512 -> 512 -> 1 for two pairs of a CycleMLP, the paper's 0.84 M; table 2 leaves it out."""
    student = vx.trace(of_table_2("cycle_mlp_b1"), input_size=(3, 224, 224))
    one, other = (
        inject_std_tokens(student, StdConfig((-1, -1), information=measured)) for measured in (True, False)
    )
    assert parameter_count(one) - parameter_count(other) == 838145


@pytest.mark.parametrize(("tokens", "length"), [("both", 24 + 16), ("spatial", 24), ("channel", 16)])
def test_tokens_of_one_kind(tokens: str, length: int) -> None:
    """The other kind's parameters are gone, and what stays computes as it did beside it."""
    model = small("mixer")
    both = inject_std_tokens(vx.trace(model), StdConfig(blocks=2)).double().eval()
    module = inject_std_tokens(vx.trace(model), StdConfig(blocks=2, tokens=tokens)).double().eval()
    path = "vmkd.std.teacher_0.tokens"
    kept, every = module.get_submodule(path), both.get_submodule(path)
    kept.load_state_dict({key: every.state_dict()[key] for key in kept.state_dict()})
    other = {"spatial": "channel", "channel": "spatial"}.get(tokens, "none of them")
    assert [key for key in every.state_dict() if other not in key] == list(kept.state_dict())

    z = images(2, dtype=torch.float64)
    assert module(z)["std/0"].shape == (2, 10)
    assert module.get_submodule("vmkd.std.teacher_0.head").in_features == length
    feature = torch.randn(2, 16, 24, dtype=torch.float64)
    expected = every(feature)[:, {"channel": slice(24, None)}.get(tokens, slice(length))]
    assert torch.equal(kept(feature), expected)


def test_the_keys_of_both_tokens() -> None:
    """Checkpoints hold them."""
    own = inject_std_tokens(vx.trace(small("mixer")), StdConfig()).get_submodule("vmkd.std").state_dict()
    block = [
        f"{part}.{kind}"
        for token in ("spatial", "channel")
        for part in (f"norm_{token}", f"mlp_{token}.fc1", f"mlp_{token}.fc2")
        for kind in ("weight", "bias")
    ]
    tokens = ["spatial", "channel", *(f"blocks.0.{name}" for name in block)]
    assert list(own) == [
        *(f"teacher_0.tokens.{name}" for name in tokens),
        *("teacher_0.head.weight", "teacher_0.head.bias"),
    ]


def test_the_class_token_is_left_out() -> None:
    model = small("deit")
    block = vx.anatomy(model).blocks[-1]
    tokens = inject_std_tokens(vx.trace(model), StdConfig()).get_submodule("vmkd.std.teacher_0.tokens")
    z = torch.randn(2, 17, 24)
    other = torch.cat([torch.randn(2, 1, 24), z[:, 1:]], 1)
    assert block.prefix_tokens == 1
    assert tokens(z).shape == (2, 24 + 16)
    assert torch.equal(tokens(z), tokens(other))
    assert not torch.equal(tokens(z), tokens(z + 1))


@pytest.mark.parametrize(
    "name", rest_slow(["deit_tiny_patch16_224", "mixer_s16_224", "resmlp_12_224", "gmlp_ti16_224"])
)
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
    ("settings", "message"),
    [
        ({"positions": ()}, "needs a position for each teacher"),
        ({"blocks": 0}, "at least one token block"),
        ({"spatial_ratio": 0}, "must be positive"),
        ({"channel_ratio": -1}, "must be positive"),
        ({"tokens": "none"}, "Known: both, channel, spatial"),
        ({"variant": "other"}, "Known: paper, third_party"),
        ({"tokens": "spatial", "information": True}, "tokens='spatial' leaves one kind"),
        ({"tokens": "channel", "variant": "third_party"}, "knows tokens='both' alone"),
        ({"teachers": 2}, "leave teachers out"),
        ({"teachers": 0, "variant": "third_party"}, "leave teachers out"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises((RecipeError, UnknownNameError), match=message):
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
