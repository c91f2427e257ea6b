"""The story of one node or module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vmkd_fx as vx
from tests.models import FoldableNet
from vmkd_fx.errors import UnknownNameError
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import randomise_
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite

aten = torch.ops.aten


def looks_at_linears(rewrite: Rewrite) -> None:
    for node in rewrite.calls(aten.linear):
        rewrite.refuse(node, "it is a Linear")


@pytest.fixture(scope="module")
def lowered() -> nn.Module:
    passes = ["constants", "channel_affine", LoweringPass("looks", looks_at_linears)]
    return vx.lower(vx.trace(randomise_(FoldableNet()), input_size=(3, 32, 32)), passes=passes)


def test_a_module_that_went_into_its_neighbour(lowered: TracedModule) -> None:
    story = vx.explain(lowered, "bn")
    assert "rewrote it: into the layer before" in story
    assert story.endswith("nothing of it is left in the result")


def test_a_node_that_was_left_alone(lowered: TracedModule) -> None:
    node = vx.ledger(lowered).steps[-2].refused[0].node
    story = vx.explain(lowered, node)
    assert "left it alone: it is a Linear" in story
    assert f"{node} = aten.linear.default(" in story


def test_a_module_with_all_that_is_in_it(lowered: TracedModule) -> None:
    story = vx.explain(lowered, "block")
    assert "block.fc1.weight" in story
    assert "block.fc2.weight" in story
    assert "head.weight" not in story
    assert "head" not in vx.explain(lowered, "hidden")


def test_an_unknown_name_lists_the_near_ones(lowered: TracedModule) -> None:
    with pytest.raises(UnknownNameError, match=r"no node or module 'blok.fc1'; did you mean 'block.fc1'"):
        vx.explain(lowered, "blok.fc1")
