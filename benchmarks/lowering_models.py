"""The models that lowering is measured on, the small member of each family, and how each is made."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import timm
import torch
from torch import nn

from vmkd_fx.errors import UnknownNameError
from vmkd_fx.graph.verify import randomise_
from vmkd_fx.models import register

MODELS = {
    "mixer_s16_224": "Mixer",
    "resmlp_12_224": "ResMLP",
    "gmlp_ti16_224": "gMLP",
    "cycle_mlp_b1": "CycleMLP",
    "gfnet_ti": "GFNet",
    "poolformer_s12": "PoolFormer",
    "riformer_s12": "RIFormer",
    "caformer_s18": "CAFormer",
    "vit_tiny_patch16_224": "ViT",
    "deit3_small_patch16_224": "DeiT III",
    "cait_xxs24_224": "CaiT",
    "xcit_nano_12_p16_224": "XCiT",
    "swin_tiny_patch4_window7_224": "Swin",
    "davit_tiny": "DaViT",
    "tiny_vit_5m_224": "TinyViT",
    "levit_128s": "LeViT",
    "efficientformer_l1": "EfficientFormer",
    "edgenext_xx_small": "EdgeNeXt",
    "mobilevit_xxs": "MobileViT",
    "fastvit_t8": "FastViT",
    "repvit_m0_9": "RepViT",
    "repvgg_a0": "RepVGG",
    "mobileone_s0": "MobileOne",
    "convnext_atto": "ConvNeXt",
    "efficientnet_b0": "EfficientNet",
    "mobilenetv4_conv_small": "MobileNetV4",
    "resnet18": "ResNet",
    "rednet26": "RedNet",
}
"""timm's names, and the families as their papers call them."""

FRESH = {"rednet26": "with random norms its logits overflow float32"}
"""Models whose norms stay as they are made, and why."""


def select(patterns: Sequence[str]) -> list[str]:
    """Names that fit shell patterns: of the list, or of all that timm knows where the list has none.

    Raises:
        UnknownNameError: no model fits a pattern.
    """
    register()
    found: dict[str, None] = {}
    for pattern in patterns or ("*",):
        fitting = fnmatch.filter(MODELS, pattern) or fnmatch.filter(timm.list_models(), pattern)
        if not fitting:
            raise UnknownNameError("model", pattern, timm.list_models())
        found.update(dict.fromkeys(fitting))
    return list(found)


def build(name: str) -> nn.Module:
    """The model in eval mode with random weights; norms and running statistics are random as well, but for
    those of `FRESH`, for a fresh norm is an identity that any tool folds for nothing.
    """
    register()
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    return model if name in FRESH else randomise_(model)
