from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

import vmkd_fx as vx
from vmkd_fx.graph.groups import Depths
from vmkd_fx.models import register


def student() -> Any:
    return timm.create_model("test_vit", num_classes=10)


def layers(model: Any) -> dict[str, int]:
    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)


def optimizer_groups(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Weight decay and scale of the learning rate of each parameter, as timm sets them."""
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], group["lr_scale"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_a_graph_answers_as_its_model_does() -> None:
    model = student()
    graph = vx.trace(model)
    assert layers(graph) == layers(model) and len(set(layers(model).values())) > 3
    assert graph.no_weight_decay() == set(model.no_weight_decay())
    assert optimizer_groups(graph) == optimizer_groups(model)


@pytest.mark.parametrize("keep", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
def test_copies_keep_the_answers(keep: Any) -> None:
    graph = vx.trace(student())
    assert optimizer_groups(keep(graph)) == optimizer_groups(graph)


def test_what_training_adds_counts_as_a_head_and_its_tokens_do_not_shrink() -> None:
    task = vx.wrap(student(), "vitkd", timm.create_model("test_vit2", num_classes=10))
    found = optimizer_groups(task.get_trainable_module())
    assert found["vmkd.vitkd.generator.mask_token"] == (0.0, 1.0)
    assert found["vmkd.vitkd.generator.generation.conv1.weight"] == (0.05, 1.0)
    assert found["head.weight"] == (0.05, 1.0)
    assert found["blocks.0.mlp.fc1.weight"][1] < found["blocks.1.mlp.fc1.weight"][1] < 1
    assert {name: found[name] for name in optimizer_groups(student())} == optimizer_groups(student())


def test_what_replaces_a_part_stands_as_deep_as_its_neighbours() -> None:
    register()
    model = timm.create_model("mixer_nano_32", img_size=32)
    before = layers(vx.trace(model))
    task = vx.wrap(model, "ccs", groups=4)
    after = layers(task.get_trainable_module())
    new = [name for name in after if name not in before]
    assert new
    for name in new:
        block = name.split(".")[1]
        assert name.startswith("blocks.") and after[name] == before[f"blocks.{block}.norm1.weight"]


def test_a_model_that_says_nothing_is_sorted_by_its_order() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 10))
    graph = vx.trace(model, input_size=(3, 8, 8))
    assert graph.no_weight_decay() == set()
    assert set(layers(graph)) == {name for name, _ in model.named_parameters()}
    create_optimizer_v2(graph, "adamw", lr=1e-3, layer_decay=0.5)


def test_neighbours_by_path() -> None:
    known = Depths({"stem.weight": 0, "blocks.1.fc.weight": 2, "blocks.1.norm.weight": 2, "head.weight": 3})
    assert known.layer_of("blocks.1.mixer.scale") == 2
    assert known.layer_of("stem.bias") == 0
    assert known.layer_of("other") == 3 and known.layer_of("vmkd.blocks.1.x") == 3
    assert known.left_alone(["stem.weight", "blocks.1.token", "blocks.1.fc.bias"]) == {"blocks.1.token"}
