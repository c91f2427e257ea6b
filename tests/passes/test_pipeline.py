"""strip and lower as a user calls them, with every step proved."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from tests.models import FAMILIES, images, renamed, small
from tests.passes.lowering import operators
from tests.slow import rest_slow
from vmkd_fx.errors import UnknownNameError, VerificationError
from vmkd_fx.graph.verify import logits_of, randomise_, relative_error
from vmkd_fx.passes import evaluation, pipeline, proof
from vmkd_fx.passes.lowering import LOWERING
from vmkd_fx.passes.rewrite import LoweringPass
from vmkd_fx.passes.std_tokens import StdConfig, inject_std_tokens


@pytest.mark.parametrize("family", rest_slow(FAMILIES, 3))
@pytest.mark.parametrize("predict", rest_slow(["class", "mean"]))
def test_a_lowered_model_computes_the_same_with_less(family: str, predict: str) -> None:
    model = randomise_(small(family)).double()
    training = inject_std_tokens(vx.trace(model), StdConfig())
    lowered = vx.lower(training, predict=predict)
    source = vx.strip(training, predict)
    x = images(3, source.info.need_input_size()[1], torch.float64)
    assert relative_error(logits_of(source, x), logits_of(lowered, x)) < 1e-12
    if predict == "class":
        assert sum(operators(lowered).values()) < sum(node.op[:5] == "call_" for node in source.graph.nodes)
    assert not lowered.training


def test_the_ledger_tells_what_happened() -> None:
    training = inject_std_tokens(vx.trace(small("resmlp")), StdConfig(positions=(-1, -1)))
    seen = []
    lowered = vx.lower(training, evaluate=lambda module: seen.append(module(images())) or 0.5)
    book = vx.ledger(lowered)
    names = [step.name for step in book.steps]
    assert names == ["training graph", "strip", "evaluation", *(step.name for step in LOWERING), "lowered"]
    sizes = [step.parameters for step in book.steps]
    assert sizes[0] > sizes[1] >= sizes[-1]
    assert all(step.error is None or step.error <= step.tolerance for step in book.steps)
    assert book.accuracy == {"class": 0.5, "mean": 0.5, "dist": 0.5}
    assert len(seen) == 3
    text = str(book)
    assert "channel_affine left" in text
    assert "accuracy by prediction: class 50.00 %, mean 50.00 %, dist 50.00 %" in text


def test_the_model_keeps_its_dtype() -> None:
    assert {p.dtype for p in vx.lower(small("mixer")).parameters()} == {torch.float32}


def test_training_modules_dissolve_by_what_they_do() -> None:
    model = small("deit")
    for part in model.modules():
        if type(part).__name__ == "DropPath":
            part.__class__ = type("Anything", (type(part),), {})
    lowered = vx.lower(model)
    kinds = {type(part).__name__ for part in lowered.modules()}
    assert not kinds & {"Anything", "ModeSwitch", "Dropout", "Identity", "DropPath"}
    assert not any("assert" in node.name for node in lowered.graph.nodes)


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda node, module: node.replace_input_with(node.all_input_nodes[1], node.all_input_nodes[0]),
        lambda node, module: setattr(node, "target", torch.sub),
    ],
)
def test_the_verifier_catches_a_corrupted_specialisation(
    monkeypatch: pytest.MonkeyPatch, corrupt: object
) -> None:
    def broken(module):
        result, idle = evaluation.specialise_to_evaluation(module)
        add = next(n for n in reversed(result.graph.nodes) if n.name.startswith("add"))
        corrupt(add, result)
        result.recompile()
        return result, idle

    monkeypatch.setattr(proof, "specialise_to_evaluation", broken)
    with pytest.raises(VerificationError, match="specialising MlpMixer to evaluation"):
        vx.lower(small("mixer"))


def test_a_head_of_zeros_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh Mixer's head is all zero: without random values behind it nothing could be seen."""
    model = small("mixer")
    assert not model.head.weight.any()

    def forgets_a_block(rewrite):
        adds = [n for n in rewrite.graph.nodes if n.name.startswith("add")]
        rewrite.take(adds[-1])
        adds[-1].replace_all_uses_with(adds[-2])

    with pytest.raises(VerificationError):
        vx.lower(model, passes=[LoweringPass("forgetful", forgets_a_block)])


@pytest.mark.parametrize("deviation", [0.0, 1e-6])
def test_a_faint_head_hides_no_error_of_a_billionth(deviation: float) -> None:
    """BEiT's fresh head makes a thousandth of what it is given: too little to see an error of 1e-9 by."""
    model = small("mixer")
    nn.init.normal_(model.head.weight, std=deviation)

    def a_little_off(rewrite):
        last = [n for n in rewrite.graph.nodes if n.name.startswith("layer_norm")][-1]
        rewrite.take(last)
        rewrite.at(last.next)
        scaled = rewrite.call(torch.ops.aten.mul.Scalar, last, 1 + 1e-9)
        last.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    with pytest.raises(VerificationError, match="pass a_little_off on"):
        vx.lower(model, passes=[LoweringPass("a_little_off", a_little_off)])


@torch.no_grad()
def corrupt_head(module: nn.Module, corruption: str) -> None:
    head = module.head
    if corruption == "dropped bias":
        head.bias = nn.Parameter(torch.zeros_like(head.bias))
    elif corruption == "flipped sign":
        head.bias = nn.Parameter(-head.bias)
    elif corruption == "one percent":
        head.weight = nn.Parameter(head.weight * 1.01)
    else:
        head.weight = nn.Parameter(head.weight.flip(0))


CORRUPTIONS = ("dropped bias", "flipped sign", "one percent", "wrong axis")


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_verifier_catches_weights_that_a_pass_spoiled(corruption: str) -> None:
    def spoils(rewrite):
        rewrite.take(next(n for n in rewrite.graph.nodes if n.op == "output"))
        corrupt_head(rewrite.module, corruption)

    with pytest.raises(VerificationError, match="pass spoiler on X, at output"):
        vx.lower(renamed(small("mixer")), passes=[LoweringPass("spoiler", spoils)])


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_strip_is_held_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, corruption: str) -> None:
    training = inject_std_tokens(vx.trace(renamed(randomise_(small("mixer")))), StdConfig())
    original = pipeline.strip

    def spoiled(model, predict="class", *, copy=False):
        stripped = original(model, predict, copy=copy)
        corrupt_head(stripped, corruption)
        return stripped

    monkeypatch.setattr(pipeline, "strip", spoiled)
    with pytest.raises(VerificationError, match="stripping"):
        vx.lower(training)


def test_an_unknown_target() -> None:
    with pytest.raises(UnknownNameError, match=r"no target 'tensort'; did you mean 'tensorrt'"):
        vx.lower(small("mixer"), target="tensort")


def test_a_plain_module_lowers_too() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 10)
    )
    lowered = vx.lower(vx.trace(model, input_size=(3, 32, 32)))
    assert "BatchNorm2d" not in {type(part).__name__ for part in lowered.modules()}
    torch.testing.assert_close(lowered(images()), model.eval()(images()))


def test_a_wrong_image_size_is_named() -> None:
    from vmkd_fx.errors import ModelError

    model = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    with pytest.raises(
        ModelError,
        match=r"images of size \(3, 200, 200\) do not pass.*Input height doesn.t match model .224.",
    ):
        vx.lower(vx.trace(model, input_size=(3, 200, 200)))
