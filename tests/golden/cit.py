"""The case of CiT's student, replayed through timm's VisionTransformer and this project's tokens."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vmkd_fx as vx
from tests.golden.case import Case
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.bias_heads import inject_bias_tokens
from vmkd_fx.passes.bias_tokens import BiasTokenConfig
from vmkd_fx.passes.prediction import predicted

_STEMS = {"conv_embed": "bias_tokens.conv_stem", "inv_embed": "bias_tokens.inv_stem"}
_HEADS = {"head_conv": "vmkd.cit.conv.fc", "head_inv": "vmkd.cit.inv.fc"}
_INVOLUTION = {
    **{"stem.0.conv": "layers.conv1", "stem.0.bn": "layers.bn1", "stem.2": "layers.bn2"},
    **{"stem.1.conv1.conv": "layers.involution.reduce", "stem.1.conv1.bn": "layers.involution.norm"},
    **{"stem.1.conv2.conv": "layers.involution.span"},
    **{"stem.4.conv": "layers.conv2", "stem.4.bn": "layers.bn3"},
}
_OUTPUTS = {"logits_cls": "logits", "logits_conv": "cit/conv", "logits_inv": "cit/inv"}


def replay_cit(case: Case) -> dict[str, Tensor]:
    """Tokens, blocks and heads in eval(); outputs of one step in train() and the statistics after it."""
    student = _student(case)
    blocks = {f"block{i}": f"block {i}" for i in range(case.config["depth"])}
    tapped = vx.tap(
        student,
        {
            "final": "final",
            "conv_embed": "bias_tokens.conv_stem",
            "inv_embed": "bias_tokens.inv_stem",
            "inv_stem": "bias_tokens.inv_stem.layers.act3",
            "conv_token": "bias_tokens_conv",
            "inv_token": "bias_tokens_inv",
            **blocks,
        },
    )
    outputs = tapped(case.arrays["in/x"])
    feature = {name.removeprefix("taps/"): value for name, value in outputs.items()}
    found = {f"out/eval/{theirs}": outputs[ours] for theirs, ours in _OUTPUTS.items()}
    found["out/eval/avg"] = predicted(outputs, "mean")
    for index, token in enumerate(("cls", "conv", "inv")):
        found[f"out/eval/feat_{token}"] = feature["final"][:, index]
    for token in ("conv_token", "inv_token"):
        found[f"out/eval/{token}"] = feature[token].squeeze(1)
    found["out/eval/inv_stem_chmean"] = feature["inv_stem"].mean((2, 3))
    for name in case.results:
        if first := re.fullmatch(r"out/eval/(\w+)_first(\d+)", name):
            found[name] = feature[first[1]][:, : int(first[2])]
    student.train()
    outputs = student(case.arrays["in/x"])
    found |= {f"out/train/{theirs}": outputs[ours] for theirs, ours in _OUTPUTS.items()}
    state = student.state_dict()
    found |= {f"train_sd/{key}": state[_ours(key)] for key in case.state("train_sd/")}
    return found


def _student(case: Case) -> TracedModule:
    """In float64 and eval(), with the recorded weights."""
    config, state = case.config, case.state()
    _, channels, height, width = case.arrays["in/x"].shape
    vit = VisionTransformer(
        img_size=(height, width),
        patch_size=2 * state["conv_embed.proj.weight"].shape[-1],
        in_chans=channels,
        num_classes=config["num_classes"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
    )
    student = vx.trace(vit.double(), input_size=(channels, height, width))
    student = inject_bias_tokens(student, BiasTokenConfig(tokens="aligned")).eval()
    positions = state.pop("pos_embed")
    ours = {_ours(key): value for key, value in state.items()}
    ours["pos_embed"] = torch.cat([positions[:, :1], positions[:, 3:]], dim=1)
    ours["bias_tokens.pos_embed"] = positions[:, 1:3]
    student.load_state_dict(ours)
    return student


def _ours(key: str) -> str:
    part, _, last = key.rpartition(".")
    top, _, inner = part.partition(".")
    if top == "conv_embed":
        inner = inner.replace("conv.", "layers.")
    elif top == "inv_embed":
        inner = _INVOLUTION.get(inner, inner)
    top = {**_STEMS, **_HEADS}.get(top, top)
    return ".".join(filter(None, (top, inner, last)))


CASES: dict[str, Callable[[Case], dict[str, Tensor]]] = {"05_cit": replay_cit}
