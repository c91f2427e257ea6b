"""Small models that the tests share: real timm families, and a few made to be hard."""

from __future__ import annotations

from functools import partial

import timm
import torch
from timm.layers import GatedMlp, GroupNorm1
from timm.models.metaformer import MetaFormer, Pooling
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from torch import nn

from vmkd_fx.models import register

FAMILIES = ("mixer", "resmlp", "gmlp", "deit", "poolformer")


def small(family: str, **options: object) -> nn.Module:
    """A small member of a family: 32x32 images, ten classes, drop rates that make train() differ from
    eval().
    """
    register()
    common: dict = {"num_classes": 10, "drop_rate": 0.1, "drop_path_rate": 0.1, **options}
    tiny = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 24, "proj_drop_rate": 0.1}
    torch.manual_seed(0)
    if family == "mixer":
        return MlpMixer(**tiny, **common)
    if family == "resmlp":
        return MlpMixer(
            **tiny, **common, mlp_ratio=4, block_layer=partial(ResBlock, init_values=0.1), norm_layer=Affine
        )
    if family == "gmlp":
        return MlpMixer(**tiny, **common, mlp_ratio=6, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp)
    if family == "deit":
        rates = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
        return timm.create_model(
            "deit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=2,
            num_heads=2,
            **rates,
            **common,
        )
    if family == "poolformer":
        model = MetaFormer(
            depths=(1, 1, 1, 1),
            dims=common.pop("dims", (8, 16, 24, 32)),
            token_mixers=Pooling,
            norm_layers=GroupNorm1,
            downsample_norm=None,
            mlp_act=nn.GELU,
            mlp_bias=True,
            layer_scale_init_values=0.1,
            res_scale_init_values=None,
            use_mlp_head=False,
            **common,
        )
        model.default_cfg = {"input_size": (3, 64, 64)}
        return model
    raise ValueError(family)


def renamed(model: nn.Module) -> nn.Module:
    """The same model whose own classes are all called something else."""
    for part in model.modules():
        if not type(part).__module__.startswith("torch.nn"):
            part.__class__ = type("X", (type(part),), {})
    return model


def images(count: int = 2, size: int = 32, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


class FusedAffineBlock(nn.Module):
    """A MetaFormer block with RIFormer's mixer: x + (affine(norm(x)) - norm(x)), then a channel MLP of 1x1
    convolutions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, channels)
        self.scale = nn.Parameter(torch.randn(channels))
        self.shift = nn.Parameter(torch.randn(channels))
        self.norm2 = nn.GroupNorm(1, channels)
        self.fc1 = nn.Conv2d(channels, 2 * channels, 1)
        self.fc2 = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm1(x)
        x = x + (n * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1) - n)
        return x + self.fc2(torch.relu(self.fc1(self.norm2(x))))


class FoldableNet(nn.Module):
    """Everything that folds in one net: conv with BatchNorm, RIFormer's affine, LayerNorm and Linear with a
    scale behind.
    """

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.num_classes = 10
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.block = FusedAffineBlock(channels)
        self.norm = nn.LayerNorm(channels)
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)
        self.beta = nn.Parameter(torch.randn(channels))
        self.hidden = nn.Linear(channels, channels)
        self.affine = Affine(channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(torch.relu(self.bn(self.stem(x))))
        x = x.flatten(2).transpose(1, 2)
        x = self.norm(x) * self.gamma + self.beta
        x = torch.tanh(self.hidden(x))
        return self.head(self.affine(x)).mean(1)
