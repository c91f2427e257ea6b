"""One graph, right in both modes, for every family of timm."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import vmkd_fx as vx
from tests.checks import assert_computes_the_same, assert_same_module, fingerprint, identical
from tests.models import images
from tests.zoo import DIVERSE, Member, build, by_family


@pytest.mark.parametrize("member", by_family(DIVERSE))
def test_the_graph_is_the_model_through_all_that_training_does(member: Member) -> None:
    model = build(member)
    twin = copy.deepcopy(model)
    before = fingerprint(twin)
    state = torch.get_rng_state()
    graph = vx.trace(twin, input_size=(3, member.size, member.size))
    assert_same_module(twin, before)
    assert torch.equal(torch.get_rng_state(), state)

    x = images(size=member.size)
    assert_computes_the_same(graph, model, x)

    assert [id(p) for p in graph.parameters()] == [id(p) for p in twin.parameters()]
    with torch.no_grad():
        expected = graph(x)
        for copied in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
            assert list(copied.state_dict()) == list(graph.state_dict())
            assert not {id(p) for p in copied.parameters()} & {id(p) for p in graph.parameters()}
            assert identical(copied(x), expected)
            assert not any(part.training for part in copied.modules())
