"""Structural re-parameterisation found in the graph, against timm's own, for every family that has one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

import vmkd_fx as vx
from tests.models import renamed
from vmkd_fx.graph.shapes import parameter_count
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import TOLERANCE, logits_of, probe_images, randomise_, relative_error
from vmkd_fx.passes.cleanup.shape_of import SHAPE_OF
from vmkd_fx.passes.fold.parallel import PARALLEL
from vmkd_fx.passes.fold.serial import SERIAL

PASSES = ["constants", SHAPE_OF, "views", "channel_affine", PARALLEL, SERIAL, "last_views"]
METHODS = ("fuse", "reparameterize", "switch_to_deploy")
"""What `reparameterize_model` asks a module for."""


@dataclass(frozen=True)
class Member:
    """A model of one of timm's modules, as small as its options make it.

    Attributes:
        family: the module, and what in it is meant.
        name, options: of the model.
        size: edge of the images in pixels.
        quick: whether it runs with the other tests, and not only with the slow ones.
        fresh: whether its norms stay as they are made, for with random ones timm's own result is another
            function than the model.
    """

    family: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 64
    quick: bool = False
    fresh: bool = False


SIZED = {"img_size": 64}
ONE_EACH = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)}
REPVIT = {"embed_dim": (16, 24, 32, 48), "depth": (1, 1, 1, 1)}
IFORMER = {"dims": (16, 24, 32, 64), "depths": (1, 1, 3, 3), "attn_groups": (0, 0, 1, 1)}
MEMBERS = (
    Member("byobnet: RepVGG", "repvgg_a0", size=32),
    Member("byobnet: MobileOne", "mobileone_s0", size=32),
    Member("efficientvim", "efficientvim_m1", {"embed_dim": (32, 48, 64), "depths": (1, 1, 1)}),
    Member("efficientvit_msra", "efficientvit_m0", {**SIZED, "depth": [1, 1, 1]}),
    Member("fastvit", "fastvit_t8", ONE_EACH),
    Member("fastvit: MobileCLIP", "fastvit_mci0", ONE_EACH),
    Member("ghostnet: V3", "ghostnetv3_050", fresh=True),
    Member("iformer", "iformer_t", IFORMER),
    Member("iformer: two heads", "iformer_l_distilled", IFORMER),
    Member("lcnetv2", "lcnetv2_small", {"depths": (1, 1, 1, 1)}, size=32),
    Member("levit", "levit_128s", SIZED),
    Member("levit: two heads", "levit_128s", {**SIZED, "distilled": True}),
    Member("nextvit", "nextvit_small", {"depths": (1, 1, 5, 1)}),
    Member("repghost", "repghostnet_050", size=32),
    Member("repvit", "repvit_m0_9", {**REPVIT, "distillation": True}, quick=True),
    Member("repvit: legacy", "repvit_m1", {**REPVIT, "legacy": True}),
    Member("shvit", "shvit_s1", {"depth": (1, 1, 1)}),
    Member("tiny_vit", "tiny_vit_5m_224", {"depths": [1, 1, 1, 1]}),
)
CASES = [
    pytest.param(member, id=member.family, marks=() if member.quick else pytest.mark.slow)
    for member in MEMBERS
]


def built(member: Member) -> nn.Module:
    """The model in float64, ten classes, random norms, eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(member.name, num_classes=10, **member.options)
    return (model if member.fresh else randomise_(model)).double().eval()


def lowered(model: nn.Module, size: int) -> TracedModule:
    return vx.lower(vx.trace(model, input_size=(3, size, size)), passes=PASSES)


def node_count(module: TracedModule) -> int:
    return sum(node.op == "call_function" for node in module.graph.nodes)


@contextmanager
def in_double() -> Iterator[None]:
    """timm makes the fused layers in the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def forget_how(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete every method that timm would ask for."""
    for part in {ancestor for module in model.modules() for ancestor in type(module).__mro__}:
        for name in METHODS:
            if name in vars(part):
                monkeypatch.delattr(part, name)


def families_with_a_method() -> set[str]:
    """timm's modules of models in which a class has one of these methods."""
    found = set()
    for family in timm.list_modules():
        module = sys.modules[timm.model_entrypoint(timm.list_models(module=family)[0]).__module__]
        if not module.__name__.startswith("timm."):
            continue  # what this project registers with timm
        classes = (part for part in vars(module).values() if inspect.isclass(part))
        own = (part for part in classes if part.__module__ == module.__name__)
        if any(name in vars(part) for part in own for name in METHODS):
            found.add(family)
    return found


def test_every_family_of_timm_that_fuses_is_here() -> None:
    assert families_with_a_method() == {member.family.partition(":")[0] for member in MEMBERS}


@pytest.mark.parametrize("member", CASES)
def test_the_graph_ends_as_small_as_timms_own(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more parameters, no more nodes, the same function; classes renamed and methods deleted."""
    model = built(member)
    with in_double():
        theirs = lowered(reparameterize_model(model), member.size)
    forget_how(model, monkeypatch)
    ours = lowered(renamed(model), member.size)
    images = probe_images(ours)
    with torch.no_grad():
        assert relative_error(model(images), logits_of(ours, images)) < TOLERANCE
    assert relative_error(logits_of(theirs, images), logits_of(ours, images)) < TOLERANCE
    assert parameter_count(ours) <= parameter_count(theirs)
    assert node_count(ours) <= node_count(theirs)
