from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import vmkd_fx as vx
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.training.optimisation import clip, gradient_norm, make_optimizer, make_scheduler

DEIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}


def student() -> nn.Module:
    made = timm.create_model("deit_tiny_patch16_224", **DEIT)
    teachers = [timm.create_model("test_resnet", num_classes=10)]
    return vx.wrap(made, "std", teachers).trainable_module


def test_layers_far_from_the_head_learn_slower_and_tokens_do_not_shrink() -> None:
    module = student()
    config = TrainConfig(lr=1.0, weight_decay=0.1, layer_decay=0.5)
    optimizer = make_optimizer(module, config)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(names)
    scales = {name: group["lr_scale"] for name, group in groups.items()}
    # Stem, two blocks, and the head with the norm before it; what training added learns as the head does.
    assert scales["patch_embed.proj.weight"] == 0.125 and scales["blocks.0.attn.qkv.weight"] == 0.25
    assert scales["blocks.1.attn.qkv.weight"] == 0.5 and scales["head.weight"] == 1
    assert {scale for name, scale in scales.items() if name.startswith("vmkd.")} == {1}
    shrinks = {name for name, group in groups.items() if group["weight_decay"]}
    assert {"vmkd.std.teacher_0.head.weight", "blocks.0.mlp.fc1.weight"} <= shrinks
    kept = {"cls_token", "pos_embed", "head.bias", "vmkd.std.teacher_0.tokens.channel"}
    assert not kept & shrinks and kept < set(groups)
    # The schedule keeps the shares.
    make_scheduler(optimizer, config, 10).step_update(0)
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates["patch_embed.proj.weight"] == 0.125 * rates["head.weight"]


def test_options_of_the_optimiser_and_of_the_warm_up() -> None:
    config = TrainConfig(
        optimizer_options={"betas": [0.8, 0.95], "eps": 1e-6}, warmup_epochs=1, warmup_lr=1e-5, lr=1e-2
    )
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    assert optimizer.defaults["betas"] == (0.8, 0.95) and optimizer.defaults["eps"] == 1e-6
    scheduler = make_scheduler(optimizer, config, 4)
    scheduler.step_update(0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
    scheduler.step_update(4)
    # The warm-up is part of the epochs: the cosine stands where it would without.
    assert 0.99e-2 < optimizer.param_groups[0]["lr"] <= 1e-2


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping(mode: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    layer(torch.full((4, 3), 100.0)).square().sum().backward()
    parameters = list(layer.parameters())
    norm = gradient_norm(parameters)
    expected = torch.cat([p.grad.flatten() for p in parameters]).norm()
    assert norm == pytest.approx(float(expected), rel=1e-6) and norm > 100
    clip(parameters, TrainConfig(), norm)
    assert gradient_norm(parameters) == norm
    clip(parameters, TrainConfig(clip_grad=0.5, clip_mode=mode), norm)
    largest = max(float(p.grad.abs().max()) for p in parameters)
    rows = layer.weight.grad.norm(dim=1), layer.weight.detach().norm(dim=1)
    found = {
        "norm": float(gradient_norm(parameters)),
        "value": largest,
        "agc": float((rows[0] / rows[1]).max()),
    }
    assert found[mode] == pytest.approx(0.5, rel=1e-4)
