"""One small member of each of timm's families, for what is too dear to check on all models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

RATES: tuple[dict[str, float], ...] = (
    {"drop_rate": 0.1, "drop_path_rate": 0.1, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1},
    {"drop_rate": 0.1, "drop_path_rate": 0.1},
    {"drop_rate": 0.1},
    {},
)
"""Rates that make train() differ from eval(), the most that a family takes first."""


@dataclass(frozen=True)
class Member:
    """A member of a family, as small as its options make it.

    Attributes:
        family: timm's module of models.
        name: of the model; the smallest of its family, or the one that is cheapest to run.
        size: edge of the images in pixels.
        built: whether the model is built for images of that size (`img_size`) and takes no other.
        options: of its constructor, that make it smaller still.
        slow: why it is dear; empty where it is cheap.
    """

    family: str
    name: str
    size: int = 32
    built: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    slow: str = ""


def build(member: Member, **options: Any) -> nn.Module:
    """The model, ten classes, with dropout and drop-path at 0.1 as far as it takes them; the same weights
    each time.
    """
    fixed = {"num_classes": 10, **({"img_size": member.size} if member.built else {}), **member.options}
    torch.manual_seed(0)
    for rates in RATES[:-1]:
        try:
            return timm.create_model(member.name, **{**rates, **fixed, **options})
        except TypeError:  # a family without these rates
            continue
    return timm.create_model(member.name, **{**fixed, **options})


THIN = {"embed_dim": 48, "depth": 2, "num_heads": 3}
GEMMA = {**THIN, "num_heads": 2, "head_dim": 24, "intermediate_size": 96}
SAM = {**THIN, "depth": 3, "global_attn_indexes": (2,)}
WIDE = "43 to 86 M parameters, and no option makes it smaller"

MEMBERS: tuple[Member, ...] = (
    Member("beit", "beit_base_patch16_224", built=True, options=THIN),
    Member("byoanet", "eca_botnext26ts_256", 64, built=True),
    Member("byobnet", "test_byobnet", built=True),
    Member("cait", "cait_xxs24_224", built=True),
    Member("coat", "coat_tiny", 64, built=True),
    Member("convit", "convit_tiny", built=True),
    Member("convmixer", "convmixer_768_32"),
    Member("convnext", "test_convnext"),
    Member("cpubone", "cpubone_nano"),
    Member("crossvit", "crossvit_tiny_240"),
    Member("csatv2", "csatv2", 64),
    Member("cspnet", "cs3darknet_focus_s"),
    Member("cspnext", "cspnext_tiny"),
    Member("davit", "davit_tiny"),
    Member(
        "deepseek_vit",
        "deepseek_vit_412m",
        42,
        built=True,
        options=THIN,
    ),
    Member("deit", "deit_tiny_patch16_224", built=True),
    Member("densenet", "densenet121"),
    Member("dla", "dla46x_c"),
    Member("dpn", "dpn48b"),
    Member("edgenext", "edgenext_xx_small"),
    Member("efficientformer", "efficientformer_l1", 224, built=True),
    Member("efficientformer_v2", "efficientformerv2_s0", built=True),
    Member("efficientnet", "test_efficientnet"),
    Member("efficientvim", "efficientvim_m1"),
    Member("efficientvit_mit", "efficientvit_b0"),
    Member("efficientvit_msra", "efficientvit_m0", built=True),
    Member("eva", "vit_tiny_patch16_dinov3_qkvb", built=True),
    Member("fasternet", "fasternet_t0"),
    Member("fastvit", "fastvit_t8"),
    Member("focalnet", "focalnet_tiny_srf"),
    Member("gcvit", "gcvit_xxtiny", 64, built=True),
    Member(
        "gemma4_vit",
        "gemma4_vit_167m",
        48,
        built=True,
        options=GEMMA,
    ),
    Member("ghostnet", "ghostnet_050"),
    Member("hardcorenas", "hardcorenas_b"),
    Member("hgnet", "hgnetv2_b0"),
    Member("hiera", "hiera_tiny_224", 64, built=True),
    Member("hieradet_sam2", "sam2_hiera_tiny"),
    Member("hrnet", "hrnet_w18_small"),
    Member("iformer", "iformer_t"),
    Member("inception_next", "inception_next_atto"),
    Member(
        "inception_resnet_v2",
        "inception_resnet_v2",
        96,
        slow=WIDE,
    ),
    Member("inception_v3", "inception_v3", 96),
    Member("inception_v4", "inception_v4", 96, slow=WIDE),
    Member("lcnetv2", "lcnetv2_small"),
    Member("levit", "levit_128s", built=True),
    Member("lowformer", "lowformer_b0"),
    Member("mambaout", "test_mambaout"),
    Member("maxxvit", "test_coatnet", 64, built=True),
    Member("metaformer", "poolformerv2_s12"),
    Member("mlp_mixer", "gmlp_ti16_224", built=True),
    Member("mobilenetv3", "mobilenetv3_small_050"),
    Member("mobilenetv5", "mobilenetv5_base", 64, slow=WIDE),
    Member("mobilevit", "mobilevit_xxs", built=True),
    Member("mvitv2", "mvitv2_tiny", 64, built=True),
    Member(
        "naflexvit",
        "naflexvit_base_patch16_parfac_gap",
        built=True,
        options=THIN,
    ),
    Member("nasnet", "nasnetalarge", 64, options={"stem_size": 12, "num_features": 192}),
    Member("nest", "nest_tiny_jx", built=True),
    Member("nextvit", "nextvit_small"),
    Member("nfnet", "test_nfnet"),
    Member("pit", "pit_ti_224", built=True),
    Member("pnasnet", "pnasnet5large", 64, slow=WIDE),
    Member("pvt_v2", "pvt_v2_b0"),
    Member("qwen3_vit", "qwen3_vit_88m", built=True, options={**THIN, "num_heads": 2}),
    Member("rdnet", "rdnet_tiny"),
    Member("regnet", "regnetx_002"),
    Member("repghost", "repghostnet_050"),
    Member("repvit", "repvit_m1", built=True),
    Member("res2net", "res2next50"),
    Member("resnest", "resnest14d"),
    Member("resnet", "test_resnet"),
    Member("resnetv2", "resnetv2_18"),
    Member("rexnet", "rexnet_100"),
    Member("selecsls", "selecsls42"),
    Member("senet", "legacy_seresnet18"),
    Member("sequencer", "sequencer2d_s", built=True),
    Member("shvit", "shvit_s1"),
    Member("sknet", "skresnet18"),
    Member("starnet", "starnet_s050"),
    Member("swiftformer", "swiftformer_xs", built=True),
    Member("swin_transformer", "swin_tiny_patch4_window7_224", 64, built=True),
    Member("swin_transformer_v2", "swinv2_tiny_window16_256", 64, built=True),
    Member("swin_transformer_v2_cr", "swinv2_cr_tiny_224", 64, built=True),
    Member("tiny_vit", "tiny_vit_5m_224"),
    Member("tnt", "tnt_s_legacy_patch16_224", built=True, options={"attn_drop_rate": 0.0}),
    Member("tresnet", "tresnet_m"),
    Member("twins", "twins_svt_small", 64, built=True),
    Member("vgg", "vgg11", options={"mlp_ratio": 0.02}),
    Member("visformer", "visformer_tiny", built=True),
    Member("vision_transformer", "test_vit", built=True),
    Member("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", built=True),
    Member("vision_transformer_relpos", "test_vit_relpos", built=True),
    Member(
        "vision_transformer_sam",
        "samvit_base_patch16_224",
        built=True,
        options=SAM,
    ),
    Member("vitamin", "vitamin_small_224", built=True),
    Member("volo", "volo_d1_224", built=True),
    Member("vovnet", "ese_vovnet19b_slim_dw"),
    Member("xception", "legacy_xception"),
    Member("xception_aligned", "xception41p"),
    Member("xcit", "xcit_nano_12_p8_224", built=True),
)
