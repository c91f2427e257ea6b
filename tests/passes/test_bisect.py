"""A wrong pass is stopped, rolled back where it is wrong and nowhere else, and found; so is a wrong node."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

import vmkd_fx as vx
from tests.models import FoldableNet, images, small
from vmkd_fx.errors import ModelError, VerificationError
from vmkd_fx.graph.verify import logits_of, randomise_, relative_error
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite

aten = torch.ops.aten
WRONG = "linear_3"
"""The second layer of the first MLP of the small DeiT, of nine Linears."""


def rewrites_linears(rewrite: Rewrite) -> None:
    """Every Linear by an equal one, but for a flipped bias at one of them."""
    for node in rewrite.calls(aten.linear):
        if rewrite.take(node, "the same Linear"):
            x, weight, bias = node.args
            sign = -1 if node.name == WRONG else 1
            flipped = rewrite.put(sign * rewrite.constant(bias), like=bias)
            rewrite.replace(node, rewrite.call(aten.linear.default, x, weight, flipped))


def fails(rewrite: Rewrite) -> None:
    for node in rewrite.calls(aten.linear):
        if rewrite.take(node):
            raise ZeroDivisionError("by intention")


BAD = LoweringPass("bad", rewrites_linears)
FAILS = LoweringPass("fails", fails)
PASSES = ("constants", BAD, "channel_affine")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomise_(small("deit"))


def test_lower_stops_and_names_pass_site_and_error(model: nn.Module) -> None:
    wrong = rf"pass bad on deit_tiny_patch16_224, at {WRONG}: differs .* by 0\.\d+ relative, at most 1e-12"
    with pytest.raises(VerificationError, match=wrong):
        vx.lower(model, passes=PASSES)


def test_keep_going_leaves_that_site_alone_and_no_other(model: nn.Module) -> None:
    double, x = deepcopy(model).double(), images(dtype=torch.float64)
    lowered = vx.lower(double, passes=PASSES, keep_going=True)
    step = next(step for step in vx.ledger(lowered).steps if step.name == "bad")
    assert [refusal.node for refusal in step.refused] == [WRONG]
    assert step.refused[0].reason.startswith("rolled back: differs")
    assert step.matched == 8
    assert WRONG not in {site.node for site in step.sites}
    assert relative_error(logits_of(double, x), logits_of(lowered, x)) < 1e-12
    assert "bad left 1 site alone: rolled back: differs" in str(vx.ledger(lowered))


def test_bisect_names_pass_site_and_node(model: nn.Module) -> None:
    found = vx.bisect(model, "onnxruntime", PASSES)
    assert [trial.name for trial in found.trials] == ["constants", "bad", "channel_affine"]
    assert [trial.good for trial in found.trials] == [True, False, True]
    bad = found.bad
    assert bad is found.trials[1]
    assert (bad.sites, bad.site.node, bad.site.where) == (9, WRONG, "blocks.0.mlp.fc2")
    assert bad.error > bad.bound
    assert bad.site_error > bad.bound
    assert bad.difference.error > bad.bound
    assert bad.difference.made_by == ("linear_default_3",)
    assert "gelu" in bad.difference.agreeing
    text = str(found)
    assert "the first bad pass on deit_tiny_patch16_224 is bad" in text
    assert "its first bad site is linear_3 in blocks.0.mlp.fc2 (the same Linear)" in text
    assert f"{bad.difference.node} is the first that differs" in text


def test_bisect_of_right_passes(model: nn.Module) -> None:
    found = vx.bisect(model, passes=["constants", "channel_affine"])
    assert found.bad is None
    assert "every pass is right on deit_tiny_patch16_224" in str(found)


def test_a_pass_that_fails_is_the_bad_one_and_the_next_ones_still_run() -> None:
    found = vx.bisect(vx.trace(FoldableNet(), input_size=(3, 32, 32)), passes=[FAILS, "channel_affine"])
    assert found.bad is found.trials[0]
    assert "pass fails on FoldableNet failed at linear: ZeroDivisionError" in str(found)
    assert found.trials[1].sites > 0
    assert found.trials[1].error <= found.trials[1].bound


def test_graphs_that_agree() -> None:
    """Lowered weights are rounded to float32 anew, which is no difference."""
    traced = vx.trace(randomise_(FoldableNet()), input_size=(3, 32, 32))
    lowered = vx.lower(traced)
    assert vx.bisect_graphs(lowered, lowered) is None
    assert vx.bisect_graphs(traced, lowered) is None


@pytest.mark.parametrize("corrupt", [lambda x: 1.01 * x, lambda x: -x, torch.zeros_like, lambda x: x.flip(0)])
def test_the_first_node_that_differs(corrupt: object) -> None:
    traced = vx.trace(randomise_(FoldableNet()), input_size=(3, 32, 32))
    lowered = vx.lower(traced, passes=[])
    with torch.no_grad():
        lowered.block.fc1.bias.copy_(corrupt(lowered.block.fc1.bias))
    found = vx.bisect_graphs(traced, lowered)
    node = next(node for node in lowered.graph.nodes if node.name == found.node)
    assert "block.fc1.bias" in {str(source.target) for source in node.all_input_nodes}
    assert "block.fc1.bias" in found.agreeing
    assert found.error > found.bound
    assert found.result > found.bound


class Root(nn.Module):
    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(weight), nn.Parameter(scale)


def scaled_linear(*, moved: bool, last: float) -> GraphModule:
    """x scaled, flattened, multiplied, shifted; or the scale moved behind the layout into the weight."""
    weight, scale = torch.arange(8.0).reshape(2, 4) + 1, torch.tensor(2.0)
    graph = Graph()
    x = graph.placeholder("x")
    matrix = graph.get_attr("weight")
    if not moved:
        x = graph.create_node("call_function", aten.mul.Tensor, (x, graph.get_attr("scale")), name="scaled")
    flat = graph.create_node("call_function", aten.flatten.using_ints, (x, 1), name="flat")
    product = graph.create_node("call_function", aten.linear.default, (flat, matrix), name="product")
    graph.output(graph.create_node("call_function", aten.add.Tensor, (product, last), name="shifted"))
    return GraphModule(Root(weight * scale if moved else weight, scale), graph)


def test_a_scale_that_moved_is_no_difference_but_what_is_wrong_behind_it_is() -> None:
    x = torch.arange(8.0).reshape(2, 1, 2, 2)
    before = scaled_linear(moved=False, last=0.5)
    assert vx.bisect_graphs(before, scaled_linear(moved=True, last=0.5), images=x) is None
    found = vx.bisect_graphs(before, scaled_linear(moved=True, last=-0.5), images=x)
    assert (found.node, found.made_by, found.agreeing, found.readers) == (
        "shifted",
        (),
        ("product",),
        ("output",),
    )


def test_another_shape_differs() -> None:
    before, after = (scaled_linear(moved=False, last=0.5) for _ in range(2))
    after.weight = nn.Parameter(torch.ones(3, 4))
    found = vx.bisect_graphs(before, after, images=torch.ones(2, 1, 2, 2))
    assert found.node == "product"
    assert math.isinf(found.error)


def test_graphs_without_a_size_need_images() -> None:
    graph = scaled_linear(moved=False, last=0.5)
    with pytest.raises(ModelError, match="images=x"):
        vx.bisect_graphs(graph, graph)
