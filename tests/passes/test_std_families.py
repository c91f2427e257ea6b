"""STD on any model with token features: a step of training, and out again."""

from __future__ import annotations

from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
import vmkd_fx.models.cycle_mlp
from tests.checks import assert_computes_the_same, assert_is
from tests.models import images, small
from tests.slow import rest_slow
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.prediction import predicted
from vmkd_fx.passes.std_tokens import StdConfig, inject_std_tokens

SMALL = {
    "cycle_mlp_b1": {"layers": (1, 1, 2, 1), "embed_dims": (8, 16, 24, 32)},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
}
FAMILIES = ("mixer", "resmlp", "gmlp", *SMALL)
LAYOUTS = {"cycle_mlp_b1": "NHWC", "convnext_atto": "NCHW"}
CONFIGS = (
    StdConfig(("2/3", -1), blocks=2, information=True),
    StdConfig((0, -1), tokens="spatial"),
    StdConfig((-1,), tokens="channel"),
    StdConfig((-2, -1), variant="third_party", teachers=3, information=True),
)


def student(family: str) -> tuple[nn.Module, int]:
    """A small one, and the side of its images."""
    if family not in SMALL:
        return small(family), 32
    torch.manual_seed(0)
    model = timm.create_model(family, num_classes=10, drop_rate=0.1, drop_path_rate=0.1, **SMALL[family])
    size = 64 if "img_size" not in SMALL[family] else 32
    model.pretrained_cfg = model.default_cfg = {"input_size": (3, size, size)}
    return model, size


def config_for(family: str, config: StdConfig) -> StdConfig:
    """Shared tokens stand in one stage; the last of these pyramids has one block, the one before it two."""
    if config.variant == "third_party" and family in LAYOUTS:
        return StdConfig((2, 3), variant="third_party", teachers=3, information=True)
    return config


def step(module: TracedModule, x: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs = module.train()(x)
    loss = sum(value.square().mean() for name, value in outputs.items() if name != "std/information")
    (loss + outputs.get("std/information", torch.zeros(()))).backward()
    return outputs


@pytest.mark.parametrize("config", rest_slow(CONFIGS), ids=("paper", "spatial", "channel", "third_party"))
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_and_comes_out(family: str, config: StdConfig) -> None:
    model, size = student(family)
    x = images(3, size)
    module = inject_std_tokens(vx.trace(model), config_for(family, config))
    assert vx.anatomy(model).blocks[-1].layout == LAYOUTS.get(family, "NLC")

    outputs = step(module, x)
    assert all(outputs[f"std/{i}"].shape == (3, 10) for i in range(config.heads))
    assert all(p.grad is not None for p in module.get_submodule("vmkd").parameters())
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    assert_is(vx.strip(module), model, x)
    assert_computes_the_same(vx.strip(module, copy=True), deepcopy(model), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_leave_the_students_own_steps_alone(family: str) -> None:
    """In train() too, with the same random numbers for dropout and stochastic depth."""
    model, size = student(family)
    module = inject_std_tokens(vx.trace(model), config_for(family, CONFIGS[0])).train()
    model.train()
    found = []
    for run in (lambda x: module(x)["logits"], model):
        torch.manual_seed(5)
        found.append(run(images(3, size)))
    assert torch.equal(*found)


@pytest.mark.parametrize("config", rest_slow(CONFIGS), ids=("paper", "spatial", "channel", "third_party"))
@pytest.mark.parametrize("predict", ["mean", "dist"])
def test_heads_can_stay_as_the_prediction(predict: str, config: StdConfig) -> None:
    """Whatever else training added is gone, with its weights."""
    config = config_for("cycle_mlp_b1", config)
    model, size = student("cycle_mlp_b1")
    nn.init.normal_(model.head.fc.weight)
    module = inject_std_tokens(vx.trace(model), config)
    tapped = vx.tap(module, {"last": -1}).eval()
    kept = vx.strip(tapped, predict).eval()
    x = images(2, size)
    expected = predicted(tapped(x), predict)
    assert not torch.allclose(expected, tapped(x)["logits"])
    torch.testing.assert_close(kept(x), expected)
    wanted = [key for key in module.state_dict() if "vmkd.std.information" not in key]
    assert list(kept.state_dict()) == wanted
