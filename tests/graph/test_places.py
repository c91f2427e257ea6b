"""Taps by index, share of the depth, stage, branch, norm, module path, pattern and node."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from tests.checks import assert_is
from tests.models import images, small
from vmkd_fx.errors import MatchError, RecipeError, UnknownNameError, VmkdError
from vmkd_fx.graph.places import find_places


def names_and_nodes(model: nn.Module, where: int | str) -> list[tuple[str, str]]:
    module = vx.trace(model)
    return [(place.name, place.node.name) for place in find_places(module, vx.anatomy(module), where)]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (0, [("block 0", "add_4")]),
        (-1, [("block 1", "add_6")]),
        ("1/2", [("block 0", "add_4")]),
        ("block -1", [("block 1", "add_6")]),
        ("block *", [("block 0", "add_4"), ("block 1", "add_6")]),
        ("stage 0", [("stage 0", "add_6")]),
        ("block 1 branch 0", [("block 1 branch 0", "blocks_1_drop_path1")]),
        ("block * branch 1", [(f"block {i} branch 1", f"blocks_{i}_drop_path2") for i in (0, 1)]),
        ("blocks.1.mlp", [("blocks.1.mlp", "blocks_1_mlp_drop2")]),
        ("blocks.*.mlp.fc1", [(f"blocks.{i}.mlp.fc1", f"blocks_{i}_mlp_fc1") for i in (0, 1)]),
        ("add_4", [("add_4", "add_4")]),
    ],
)
def test_places_of_a_vit(where: int | str, found: list[tuple[str, str]]) -> None:
    shown = names_and_nodes(small("deit"), where)
    assert [name for name, _ in shown] == [name for name, _ in found]
    adds = {node for _, node in shown if node.startswith("add")}
    assert adds or [node for _, node in shown] == [node for _, node in found]


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("block 9", MatchError, "it has 2, so 0 to 1"),
        ("stage 4", MatchError, "has no stage 4; it has 1 stages, 0 to 0"),
        ("block 0 branch 2", MatchError, r"\(blocks.0\) has no branch 2; it has 2 branches, 0 to 1"),
        ("stage 0 norm 0", MatchError, "belong to a block: 'block 3 norm 0'"),
        ("blocks.0.mpl", UnknownNameError, "did you mean 'blocks.0.mlp'"),
        ("blocks.*.mpl", UnknownNameError, "no module that fits 'blocks.*.mpl'"),
    ],
)
def test_a_place_that_does_not_exist(where: str, error: type[VmkdError], message: str) -> None:
    with pytest.raises(error, match=message):
        vx.tap(small("deit"), [where])


def test_a_branch_without_a_norm() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    with pytest.raises(MatchError, match=r"branch 0 of block 3 of resnet18 .* starts without a norm"):
        vx.tap(model, ["block 3 norm 0"])
    with pytest.raises(MatchError, match=r"'block \* norm \*' fits nothing: resnet18 has 8 blocks"):
        vx.tap(model, ["block * norm *"])


def test_a_tap_holds_what_the_module_returns_and_leaves_the_rest_alone() -> None:
    model = small("deit").eval()
    seen = {}
    handle = model.blocks[1].mlp.register_forward_hook(lambda _, __, value: seen.update(mlp=value))
    tapped = vx.tap(model, {"a": "blocks.1.mlp", "b": -1}).eval()
    with torch.no_grad():
        expected, outputs = model(images()), tapped(images())
    handle.remove()
    assert list(outputs) == ["logits", "taps/a", "taps/b"]
    assert torch.equal(outputs["logits"], expected)
    assert torch.equal(outputs["taps/a"], seen["mlp"])


def test_a_feature_that_is_written_over_leaves_as_it_was() -> None:
    """A ReLU with inplace=True stands behind the BatchNorm."""
    model = timm.create_model("resnet18", num_classes=10).eval()
    kept = {}
    model.layer1[0].bn1.register_forward_hook(lambda _, __, value: kept.update(bn=value.clone()))
    tapped = vx.tap(model, ["layer1.0.bn1"]).eval()
    with torch.no_grad():
        expected, outputs = model(images()), tapped(images())
    assert float(kept["bn"].min()) < 0
    assert torch.equal(outputs["taps/layer1.0.bn1"], kept["bn"])
    assert torch.equal(outputs["logits"], expected)


def test_strip_takes_taps_out_in_any_mixture() -> None:
    student = small("deit")
    tapped = vx.tap(vx.tap(student, ["block *"]), ["blocks.*.attn"])
    assert len(tapped(images())) == 1 + 2 + 2
    assert_is(vx.strip(tapped), student, images())


@pytest.mark.parametrize(
    ("places", "error"), [([], RecipeError), ([-1, "-1"], RecipeError), (["block * norm *", -9], MatchError)]
)
def test_places_that_cannot_be(places: list[int | str], error: type[VmkdError]) -> None:
    with pytest.raises(error):
        vx.tap(small("deit"), places)


def test_what_holds_no_tensor_cannot_be_tapped() -> None:
    module = vx.trace(small("deit"))
    shape = next(node.name for node in module.graph.nodes if node.target is getattr)
    with pytest.raises(MatchError, match="holds no single tensor"):
        vx.tap(module, [shape])


def test_taps_work_under_compile() -> None:
    tapped = vx.tap(small("mixer").eval(), ["block *"]).eval()
    compiled = torch.compile(tapped, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for name, value in tapped(images()).items():
            torch.testing.assert_close(compiled(images())[name], value, rtol=1e-5, atol=1e-5)
