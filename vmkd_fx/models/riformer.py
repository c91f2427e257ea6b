"""MetaFormers without a learnt token mixer: RIFormer, IdentityFormer, RandFormer.

RIFormer (Wang et al., 2023) is PoolFormer (Yu et al., 2022) with a per-channel affine instead of the pooling.
IdentityFormer and RandFormer (Yu et al., "MetaFormer Baselines for Vision", 2022) are PoolFormerV2 with
nothing in its place, or a frozen random matrix. All stand on timm's MetaFormer, so that a PoolFormer teacher
and its student share the names and shapes of all parameters but the mixers'.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GroupNorm1, Mlp, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, metaformer, register_model
from timm.models.metaformer import GroupNorm1NoBias, MetaFormer
from torch import Tensor, nn

from vmkd_fx.errors import ModelError
from vmkd_fx.models.affine_mixer import AffineMixer

__all__ = ["RIFormer", "RandFormer", "RandomMixing"]

_S12 = {"depths": (2, 2, 6, 2), "dims": (64, 128, 320, 512)}
_S24 = {"depths": (4, 4, 12, 4), "dims": (64, 128, 320, 512)}
_S36 = {"depths": (6, 6, 18, 6), "dims": (64, 128, 320, 512), "layer_scale_init_values": 1e-6}
_M36 = {"depths": (6, 6, 18, 6), "dims": (96, 192, 384, 768), "layer_scale_init_values": 1e-6}
_M48 = {"depths": (8, 8, 24, 8), "dims": (96, 192, 384, 768), "layer_scale_init_values": 1e-6}


class RIFormer(MetaFormer):
    """PoolFormer's blocks with an affine as token mixer; every norm is over (C, H, W) at once, with eps 1e-5.

    The last norm sees the whole map and pooling follows, as in the authors' PoolFormer and RIFormer. timm's
    PoolFormer has the same parameters under the same names and pools first, which scales an image's logits.

    Args:
        depths, dims: blocks and channels of each stage.
        token_mixers: class of the mixer; `nn.Identity` is the deployed form, with affines merged into norms.
        mlp_ratios: hidden width of the MLPs over the channels, one for all stages or one a stage.
        layer_scale_init_values: start of both layer scales of a block.
        others: as for timm's MetaFormer: num_classes, in_chans, drop_rate, drop_path_rate, proj_drop_rate...

    Raises:
        ModelError: other numbers of `depths`, `dims` and `mlp_ratios`.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        token_mixers: type[nn.Module] = AffineMixer,
        mlp_ratios: float | Sequence[float] = 4.0,
        layer_scale_init_values: float = 1e-5,
        **others: Any,
    ) -> None:
        ratios = [mlp_ratios] * len(depths) if isinstance(mlp_ratios, (int, float)) else list(mlp_ratios)
        if not len(depths) == len(dims) == len(ratios):
            raise ModelError(
                f"depths {tuple(depths)}, dims {tuple(dims)} and mlp_ratios {tuple(ratios)} give "
                f"{len(depths)}, {len(dims)} and {len(ratios)} stages; give one of each a stage"
            )
        norms = {"norm_layers": GroupNorm1, "downsample_norm": None, "output_norm": GroupNorm1}
        mlps = {"mlp_act": nn.GELU, "mlp_bias": True, "use_mlp_head": False}
        scales = {"layer_scale_init_values": layer_scale_init_values, "res_scale_init_values": None}
        arguments = {**norms, **mlps, **scales, **others}
        super().__init__(depths=tuple(depths), dims=tuple(dims), token_mixers=token_mixers, **arguments)
        placing = {name: others[name] for name in ("device", "dtype") if name in others}
        for stage, dim, ratio in zip(self.stages, dims, ratios, strict=True):
            for block in stage.blocks if ratio != 4 else ():  # timm's block knows no other ratio
                drop = others.get("proj_drop_rate", 0.0)
                block.mlp = Mlp(dim, int(ratio * dim), drop=drop, use_conv=True, **placing)
                block.mlp.apply(self._init_weights)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head.global_pool(self.head.norm(x))
        x = self.head.drop(self.head.flatten(x))
        return x if pre_logits else self.head.fc(x)


class RandomMixing(nn.Module):
    """y = W x over the tokens of each channel, with a random W that is never trained: rows are softmaxes of
    uniform numbers, so each token becomes a mean of all.

    Args:
        grid_size: (H, W) in tokens; W has (H * W)² entries, kept in the state dict.
        device, dtype: of W.

    Shapes: x (B, C, H, W), y likewise.
    """

    random_matrix: Tensor

    def __init__(self, grid_size: tuple[int, int], device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.grid_size = grid_size
        tokens = grid_size[0] * grid_size[1]
        drawn = torch.rand(tokens, tokens, device=device, dtype=dtype)
        self.register_buffer("random_matrix", drawn.softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(2), self.random_matrix).unflatten(2, self.grid_size)

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}"


class RandFormer(MetaFormer):
    """A MetaFormer whose later stages mix tokens by frozen random matrices, and whose earlier ones do not.

    Args:
        img_size: in pixels; the matrices fit no other.
        random_stages: the stages with random mixing, counted from 0.
        others: as for timm's MetaFormer.
    """

    def __init__(
        self, img_size: int | tuple[int, int] = 224, random_stages: Sequence[int] = (2, 3), **others: Any
    ) -> None:
        super().__init__(token_mixers=nn.Identity, **others)
        placing = {name: others[name] for name in ("device", "dtype") if name in others}
        height, width = to_2tuple(img_size)
        grid = (height - 3) // 4 + 1, (width - 3) // 4 + 1
        for index, stage in enumerate(self.stages):
            if not isinstance(stage.downsample, nn.Identity):
                grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
            for block in stage.blocks if index in random_stages else ():
                block.token_mixer = RandomMixing(grid, **placing)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' RIFormer weights under timm's names; others pass as timm passes them.

    Weights of their deployed form, norms merged, fit `token_mixers=nn.Identity`.
    """
    renamed = {}
    for key, value in state_dict.items():
        if "stem.conv.weight" not in state_dict:
            key = key.removeprefix("backbone.").replace("head.fc.", "head.")
            key = key.replace("token_mixer.affine.weight", "token_mixer.scale")
            key = key.replace("token_mixer.affine.bias", "token_mixer.shift")
            key = re.sub(r"^norm\d+\.", "norm.", key.replace("norm_reparam.", "norm1."))
        renamed[key] = value
    return metaformer.checkpoint_filter_fn(renamed, model)


def _cfg(**settings: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        **settings,
    }


default_cfgs = generate_default_cfgs(
    {
        "riformer_s12.untrained": _cfg(),
        "riformer_s24.untrained": _cfg(),
        "riformer_s36.untrained": _cfg(),
        "riformer_m36.untrained": _cfg(crop_pct=0.95),
        "riformer_m48.untrained": _cfg(crop_pct=0.95),
        "identityformer_s12.untrained": _cfg(crop_pct=1.0),
        "randformer_s12.untrained": _cfg(crop_pct=1.0, fixed_input_size=True),
    }
)


def _create(kind: type[MetaFormer], variant: str, pretrained: bool, settings: dict[str, Any]) -> MetaFormer:
    stages = range(len(settings.get("depths", (2, 2, 6, 2))))
    features = {"flatten_sequential": True, "out_indices": settings.pop("out_indices", tuple(stages))}
    return build_model_with_cfg(
        kind,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=features,
        **settings,
    )


@register_model
def riformer_s12(pretrained: bool = False, **kwargs: Any) -> RIFormer:
    """RIFormer-S12: 11.915 M parameters and 1.823 G multiply-adds once deployed."""
    return _create(RIFormer, "riformer_s12", pretrained, {**_S12, **kwargs})


@register_model
def riformer_s24(pretrained: bool = False, **kwargs: Any) -> RIFormer:
    """RIFormer-S24: 21.389 M parameters and 3.413 G multiply-adds once deployed."""
    return _create(RIFormer, "riformer_s24", pretrained, {**_S24, **kwargs})


@register_model
def riformer_s36(pretrained: bool = False, **kwargs: Any) -> RIFormer:
    """RIFormer-S36: 30.863 M parameters and 5.003 G multiply-adds once deployed."""
    return _create(RIFormer, "riformer_s36", pretrained, {**_S36, **kwargs})


@register_model
def riformer_m36(pretrained: bool = False, **kwargs: Any) -> RIFormer:
    """RIFormer-M36: 56.173 M parameters and 8.802 G multiply-adds once deployed."""
    return _create(RIFormer, "riformer_m36", pretrained, {**_M36, **kwargs})


@register_model
def riformer_m48(pretrained: bool = False, **kwargs: Any) -> RIFormer:
    """RIFormer-M48: 73.473 M parameters and 11.591 G multiply-adds once deployed."""
    return _create(RIFormer, "riformer_m48", pretrained, {**_M48, **kwargs})


@register_model
def identityformer_s12(pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    """IdentityFormer-S12: PoolFormerV2-S12 without its pooling, 11.9 M parameters."""
    settings = {**_S12, "norm_layers": GroupNorm1NoBias, "use_mlp_head": False, "token_mixers": nn.Identity}
    return _create(MetaFormer, "identityformer_s12", pretrained, {**settings, **kwargs})


@register_model
def randformer_s12(pretrained: bool = False, **kwargs: Any) -> RandFormer:
    """RandFormer-S12: IdentityFormer-S12 with random mixing in stages 3 and 4, 11.9 M parameters and 0.2 M
    frozen numbers.
    """
    settings = {**_S12, "norm_layers": GroupNorm1NoBias, "use_mlp_head": False}
    return _create(RandFormer, "randformer_s12", pretrained, {**settings, **kwargs})
