"""CiT's tokens stay, its heads come off."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vmkd_fx as vx
from tests.checks import assert_is, assert_same_module, fingerprint
from tests.models import images, small
from tests.passes.lowering import operators
from tests.slow import rest_slow
from vmkd_fx.errors import MatchError, ReceiptError, RecipeError, UnknownNameError
from vmkd_fx.graph.replace import Replaced, replacements
from vmkd_fx.graph.shapes import parameter_count
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import randomise_
from vmkd_fx.passes.bias_heads import BiasHeadConfig, inject_bias_heads, inject_bias_tokens
from vmkd_fx.passes.bias_stems import ConvStem, InvolutionStem
from vmkd_fx.passes.bias_tokens import BiasTokenConfig, add_bias_tokens
from vmkd_fx.passes.feature_taps import tap
from vmkd_fx.passes.prediction import keep_as_prediction, predicted

BOTH = ("aligned", "random")
OUTPUTS = ["logits", "cit/conv", "cit/inv"]


def _with_tokens(tokens: str, model: nn.Module | None = None) -> TracedModule:
    return inject_bias_tokens(vx.trace(model or small("deit")), BiasTokenConfig(tokens))


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=10, drop_rate=0.1)


@pytest.mark.parametrize(
    ("name", "tokens", "three_heads", "class_head"),
    [
        ("deit_tiny_patch16_224", "random", 6.104, 5.718),
        ("deit_small_patch16_224", "random", 22.822, 22.052),
        ("deit_small_patch16_224", "aligned", 25.776, 25.006),
    ],
)
def test_sizes_of_cit_table_3(name: str, tokens: str, three_heads: float, class_head: float) -> None:
    """Millions of parameters of CiT-Ti, CiT-S and CiT-SAK, with three heads and with the class head alone."""
    with torch.device("meta"):
        module = _with_tokens(tokens, timm.create_model(name))
    assert parameter_count(module) / 1e6 == pytest.approx(three_heads, abs=5e-4)
    assert parameter_count(vx.strip(module)) / 1e6 == pytest.approx(class_head, abs=5e-4)


@pytest.mark.parametrize("tokens", BOTH)
def test_three_heads_leave_two_of_them_with_tokens_of_their_own(tokens: str) -> None:
    module = _with_tokens(tokens).eval()
    outputs = module(images(3))
    assert list(outputs) == OUTPUTS
    assert all(value.shape == (3, 10) for value in outputs.values())
    assert [(b.prefix_tokens, b.tokens) for b in vx.anatomy(module).blocks] == [(3, 16)] * 2
    assert module.info.num_prefix_tokens == 3


@pytest.mark.parametrize("tokens", BOTH)
def test_strip_takes_the_heads_and_leaves_the_tokens(tokens: str) -> None:
    student = add_bias_tokens(vx.trace(small("deit")), BiasTokenConfig(tokens))
    module = inject_bias_heads(student, BiasHeadConfig())
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    for _ in range(2):
        sum(value.square().mean() for value in module.train()(images(4)).values()).backward()
        optimizer.step()
    stripped = vx.strip(module)
    assert_is(stripped, student, images(3))
    assert torch.equal(stripped.eval()(images(3)), module.eval()(images(3))["logits"])
    assert not [key for key in stripped.state_dict() if key.startswith("vmkd.")]
    paths = ("conv_stem", "inv_stem") if tokens == "aligned" else ()
    expected = tuple(f"bias_tokens.{path}" for path in paths) or ("bias_tokens",)
    assert replacements(stripped) == (Replaced("bias_tokens", {"tokens": tokens}, expected),)


def test_random_tokens_add_keys_and_keep_the_students() -> None:
    model = small("deit")
    stripped = vx.strip(_with_tokens("random", model))
    added = {f"bias_tokens.{name}" for name in ("conv_token", "inv_token", "pos_embed")}
    assert set(stripped.state_dict()) == set(model.state_dict()) | added


def test_aligned_tokens_replace_the_patch_embedding() -> None:
    model = small("deit")
    module = _with_tokens("aligned", model)
    gone = set(model.state_dict()) - set(module.state_dict())
    assert gone == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert not any(path.startswith("patch_embed") for path, _ in module.named_modules())


def test_the_given_model_is_left_alone() -> None:
    for tokens in BOTH:
        model = small("deit").eval()
        before = fingerprint(model)
        vx.strip(_with_tokens(tokens, model).train())
        assert_same_module(model, before)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}


@pytest.mark.parametrize(
    ("kind", "registers", "options"),
    [
        (VisionTransformer, "reg_tokens", {}),
        (VisionTransformer, "reg_tokens", {"no_embed_class": True}),
        (VisionTransformer, "reg_tokens", {"global_pool": "avg", "pre_norm": True}),
        (Eva, "num_reg_tokens", {"use_rot_pos_emb": True}),
        (Eva, "num_reg_tokens", {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "global_pool": "token"}),
    ],
)
def test_random_tokens_are_registers(kind: type[nn.Module], registers: str, options: dict) -> None:
    """timm's own models with two register tokens compute the same, rotary positions and pooling included."""
    torch.manual_seed(0)
    reference = randomise_(kind(**VIT, **options, **{registers: 2}).double()).eval()
    student = vx.strip(_with_tokens("random", kind(**VIT, **options).double())).eval()
    state = dict(reference.state_dict())
    conv, inv = state.pop("reg_token").split(1, dim=1)
    state |= {"bias_tokens.conv_token": conv, "bias_tokens.inv_token": inv}
    if state.get("pos_embed") is not None and not options.get("no_embed_class"):
        first, second, rest = state["pos_embed"].split([1, 2, 16], dim=1)
        state |= {"pos_embed": torch.cat([first, rest], dim=1), "bias_tokens.pos_embed": second}
    student.load_state_dict(state)
    for name, buffer in reference.named_buffers():
        student.get_buffer(name).copy_(buffer)
    x = images(3, dtype=torch.float64)
    torch.testing.assert_close(student(x), reference(x), rtol=1e-12, atol=1e-12)


def test_tokens_stand_behind_all_prefix_tokens() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", **VIT)
    outputs = tap(_with_tokens("random", model).eval(), {"last": -1})(images(2))
    assert outputs["taps/last"].shape == (2, 2 + 2 + 16, 24)


def test_aligned_tokens_are_the_means_of_the_stems() -> None:
    module = _with_tokens("aligned").eval()
    nn.init.zeros_(module.get_parameter("bias_tokens.pos_embed"))
    nn.init.zeros_(module.get_parameter("pos_embed"))
    named = {"stream": "pos_drop", "conv": "bias_tokens.conv_stem", "inv": "bias_tokens.inv_stem"}
    with torch.no_grad():
        outputs = tap(module, named)(images(2))
    stream, conv, inv = (outputs[f"taps/{name}"] for name in named)
    expected = torch.cat([conv.mean(1, keepdim=True), inv.mean(1, keepdim=True), conv + inv], dim=1)
    torch.testing.assert_close(stream[:, 1:], expected)


@pytest.mark.parametrize("tokens", BOTH)
def test_gradients_reach_stems_tokens_and_heads(tokens: str) -> None:
    module = _with_tokens(tokens).train()
    outputs = module(images(4))
    sum(value.square().mean() for value in outputs.values()).backward()
    without = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in without if name.startswith(("bias_tokens", "vmkd", "patch", "blocks"))]
    assert {name.split(".")[1] for name, _ in module.named_parameters() if name.startswith("bias_")} == (
        {"conv_stem", "inv_stem", "pos_embed"}
        if tokens == "aligned"
        else {"conv_token", "inv_token", "pos_embed"}
    )


@pytest.mark.parametrize("head", ["conv", "inv"])
def test_each_head_reads_its_own_token(head: str) -> None:
    """Behind the last block tokens no longer meet, so a head's own gradient there is on its token alone."""
    module = tap(_with_tokens("random").eval(), {"final": "final"})
    outputs = module(images(2))
    (gradient,) = torch.autograd.grad(outputs[f"cit/{head}"].sum(), outputs["taps/final"])
    reached = gradient.abs().sum((0, 2)).nonzero().flatten().tolist()
    assert reached == [{"conv": 1, "inv": 2}[head]]


@pytest.mark.parametrize("family", ["mixer", "resmlp", "poolformer", "resnet", "deit"])
def test_heads_alone_leave_the_student_bit_for_bit(family: str) -> None:
    model = _resnet() if family == "resnet" else small(family)
    x = images(3, vx.trace(model).info.need_input_size()[1])
    module = inject_bias_heads(vx.trace(model), BiasHeadConfig())
    assert_is(vx.strip(module), model, x)
    outputs = module.eval()(x)
    assert list(outputs) == OUTPUTS
    assert torch.equal(outputs["logits"], model.eval()(x))
    for name in OUTPUTS[1:]:
        assert outputs[name].shape == (3, 10)
        module.zero_grad()
        outputs[name].sum().backward(retain_graph=True)
        assert any(p.grad is not None and p.grad.any() for p in model.parameters()), "the student learns"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.SGD(module.parameters(), lr=1e-2).step()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert_is(vx.strip(module), model, x)


@pytest.mark.parametrize("family", ["mixer", "resnet"])
def test_heads_alone_read_what_the_classifier_reads(family: str) -> None:
    model = _resnet() if family == "resnet" else small(family)
    x = images(3, vx.trace(model).info.need_input_size()[1])
    module = inject_bias_heads(vx.trace(model), BiasHeadConfig()).eval()
    module.get_submodule("vmkd.cit.conv.fc").load_state_dict(model.get_classifier().state_dict())
    outputs = module(x)
    torch.testing.assert_close(outputs["cit/conv"], outputs["logits"])


def test_predictions() -> None:
    module = _with_tokens("random").eval()
    outputs = module(images())
    mean = (outputs["logits"] + outputs["cit/conv"] + outputs["cit/inv"]) / 3
    torch.testing.assert_close(predicted(outputs, "mean"), mean)
    assert predicted(outputs, "class") is outputs["logits"]
    dist = (outputs["cit/conv"] + outputs["cit/inv"]) / 2
    torch.testing.assert_close(predicted(outputs, "dist"), dist)
    kept = keep_as_prediction(module, "mean")
    torch.testing.assert_close(kept(images()), mean)
    assert not kept.receipts and replacements(kept)
    with pytest.raises(UnknownNameError, match="Known: class, dist, mean"):
        predicted(outputs, "conv")
    with pytest.raises(MatchError, match="has none; use 'class'"):
        keep_as_prediction(vx.strip(module), "mean")


@pytest.mark.parametrize("tokens", BOTH)
def test_copies_and_pickles(tokens: str) -> None:
    module = _with_tokens(tokens).eval()
    expected = module(images())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), vx.trace(module)):
        assert all(torch.equal(value, expected[name]) for name, value in other(images()).items())
        assert replacements(other) == replacements(module)
        assert torch.equal(vx.strip(other)(images()), expected["logits"])


@pytest.mark.parametrize("tokens", rest_slow(BOTH))
def test_compiles_whole(tokens: str) -> None:
    module = _with_tokens(tokens).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for name, value in compiled(images()).items():
        torch.testing.assert_close(value, module(images())[name])


@pytest.mark.parametrize("tokens", rest_slow(BOTH))
def test_lowers(tokens: str) -> None:
    """The stems' convolutions take in the BatchNorm behind them; that behind the involution has none."""
    module = _with_tokens(tokens).eval()
    randomise_(module)
    lowered = vx.lower(module)
    torch.testing.assert_close(lowered(images()), module(images())["logits"], rtol=1e-4, atol=1e-4)
    assert operators(lowered)["batch_norm"] == (1 if tokens == "aligned" else 0)
    assert replacements(lowered) == replacements(module)


def test_taps_and_checkpointing_find_the_blocks_as_before() -> None:
    module = _with_tokens("aligned").train()
    torch.manual_seed(1)
    expected = module(images(2))["cit/inv"]
    module.set_grad_checkpointing()
    torch.manual_seed(1)
    torch.testing.assert_close(module(images(2))["cit/inv"], expected)


def test_other_patches_and_channels() -> None:
    options = {**VIT, "img_size": (32, 48), "patch_size": 16, "in_chans": 1}
    student = vx.trace(VisionTransformer(**options), input_size=(1, 32, 48))
    module = inject_bias_tokens(student, BiasTokenConfig())
    assert module(torch.randn(2, 1, 32, 48))["cit/conv"].shape == (2, 10)
    assert ConvStem(1, 8, 4)(torch.zeros(1, 1, 8, 12)).shape == (1, 6, 8)
    assert InvolutionStem(1, 8, 4)(torch.zeros(1, 1, 8, 12)).shape == (1, 6, 8)


class _CountsTokens(VisionTransformer):
    """Rolls the tokens behind the blocks: a shape that fits, for any number."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x.roll(1, 1), pre_logits)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: small("mixer"), r"16 patches \(NLC\) behind 0 prefix tokens.*inject_bias_heads"),
        (_resnet, "behind 0 prefix tokens"),
        (lambda: VisionTransformer(**VIT, class_token=False, global_pool="avg"), "behind 0 prefix tokens"),
        (
            lambda: timm.create_model("beit_base_patch16_224", **VIT),
            r"17 of beit.*blocks\.0\.attn holds for that number alone, as with a relative position bias",
        ),
        (
            lambda: timm.create_model("cait_xxs24_224", **VIT, depth_token_only=1),
            "behind 0 prefix tokens",
        ),
        (lambda: timm.create_model("pit_ti_224", num_classes=10), "49 patches.*729 patches"),
        (lambda: _CountsTokens(**VIT), "roll takes tokens by their place"),
        (lambda: VisionTransformer(**{**VIT, "img_size": 30, "patch_size": 5}), "no square patches with an"),
        (
            lambda: VisionTransformer(**VIT, patch_drop_rate=0.5),
            "patch_drop, a .* takes tokens by their place",
        ),
    ],
)
def test_students_that_do_not_fit(model: object, reason: str) -> None:
    student = vx.trace(model())
    code = student.code
    with pytest.raises(MatchError, match=reason):
        inject_bias_tokens(student, BiasTokenConfig())
    assert student.code == code and not replacements(student)


def test_random_tokens_keep_patches_that_no_stem_makes() -> None:
    module = _with_tokens("random", VisionTransformer(**{**VIT, "img_size": 30, "patch_size": 5}))
    assert module(images(2, 30))["cit/inv"].shape == (2, 10)


def test_no_classes_no_heads() -> None:
    with pytest.raises(MatchError, match="num_classes=0"):
        _with_tokens("random", small("deit", num_classes=0))
    with pytest.raises(MatchError, match="num_classes=0"):
        inject_bias_heads(vx.trace(small("mixer", num_classes=0)), BiasHeadConfig())


def test_two_classifiers_are_no_pooled_feature() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", **VIT)
    with pytest.raises(MatchError, match="puts 2 tensors together"):
        inject_bias_heads(vx.trace(model), BiasHeadConfig())


def test_tokens_come_first_and_once() -> None:
    tapped = tap(small("deit"), [-1])
    with pytest.raises(ReceiptError, match="add CiT's tokens first"):
        inject_bias_tokens(tapped, BiasTokenConfig())
    student = add_bias_tokens(vx.trace(small("deit")), BiasTokenConfig("random"))
    with pytest.raises(ReceiptError, match="add CiT's tokens once"):
        add_bias_tokens(student, BiasTokenConfig("random"))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(RecipeError, match="'aligned' or 'random', got tokens='learnt'"):
        BiasTokenConfig("learnt")
