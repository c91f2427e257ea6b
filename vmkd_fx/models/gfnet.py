"""GFNet (Rao et al., "Global Filter Networks for Image Classification", 2021), flat and hierarchical.

The flat models have a global filter where a ViT has attention; the hierarchical ones have four stages and a
layer scale. Parameters have the names of the authors' checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, calculate_drop_path_rates, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from vmkd_fx.errors import ModelError
from vmkd_fx.models.gfnet_base import GlobalFilterNet
from vmkd_fx.models.global_filter import Downsample, GlobalFilterBlock, Grid

__all__ = ["GFNet", "GFNetPyramid"]


def _grid(img_size: int | tuple[int, int], patch_size: int, stages: int = 1) -> Grid:
    """Tokens (H, W) of the first stage.

    Raises:
        ModelError: images are too small for a token in the last.
    """
    height, width = to_2tuple(img_size)
    least = patch_size * 2 ** (stages - 1)
    if min(height, width) < least:
        raise ModelError(
            f"images of {height}x{width} pixels leave no token; they have at least {least}x{least}"
        )
    return height // patch_size, width // patch_size


class GFNet(GlobalFilterNet):
    """The flat form: `depth` blocks on one grid; no layer scale unless `layer_scale` says where it starts.

    Args:
        img_size: in pixels; filters and position embedding fit no other.
        others: `num_classes`, `global_pool`, `drop_rate` (before the classifier), `pos_drop_rate`.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: of the last block, from 0 in the first.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 256,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **others: Any,
    ) -> None:
        grid = _grid(img_size, patch_size)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        blocks = (
            GlobalFilterBlock(embed_dim, grid, mlp_ratio, layer_scale, proj_drop_rate, r) for r in rates
        )
        info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        super().__init__(embed, nn.ModuleList(blocks), [grid] * depth, info, **others)


class GFNetPyramid(GlobalFilterNet):
    """The hierarchical form: stages of half the height and width each.

    Args:
        img_size: in pixels; filters and position embedding fit no other.
        patch_size: of the first stage.
        embed_dim, depth, mlp_ratio: of each stage.
        layer_scale: where gamma starts; None for none.
        others: as for `GFNet`.

    Raises:
        ModelError: other numbers of `embed_dim`, `depth` and `mlp_ratio`; images too small for a last stage.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: Sequence[int] = (64, 128, 256, 512),
        depth: Sequence[int] = (3, 3, 10, 3),
        mlp_ratio: Sequence[float] = (4.0, 4.0, 4.0, 4.0),
        layer_scale: float | None = 1e-3,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **others: Any,
    ) -> None:
        if not len(embed_dim) == len(depth) == len(mlp_ratio):
            raise ModelError(
                f"embed_dim {tuple(embed_dim)}, depth {tuple(depth)} and mlp_ratio {tuple(mlp_ratio)} give "
                f"{len(embed_dim)}, {len(depth)} and {len(mlp_ratio)} stages; give one of each a stage"
            )
        height, width = _grid(img_size, patch_size, len(depth))
        grids = [(height >> i, width >> i) for i in range(len(depth))]
        rates = calculate_drop_path_rates(drop_path_rate, list(depth), stagewise=True)
        embeds: list[nn.Module] = [PatchEmbed(img_size, patch_size, in_chans, embed_dim[0])]
        embeds += map(Downsample, embed_dim, embed_dim[1:], grids)
        stages = [
            nn.Sequential(
                *(GlobalFilterBlock(dim, grid, ratio, layer_scale, proj_drop_rate, rate) for rate in own)
            )
            for dim, grid, ratio, own in zip(embed_dim, grids, mlp_ratio, rates, strict=True)
        ]
        info = [
            {"module": f"blocks.{i}", "num_chs": dim, "reduction": patch_size << i}
            for i, dim in enumerate(embed_dim)
        ]
        super().__init__(nn.ModuleList(embeds), nn.ModuleList(stages), grids, info, **others)


def _cfg(**settings: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **settings,
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"gfnet_{size}.untrained": _cfg() for size in ("ti", "xs", "s", "b")},
        **{f"gfnet_h_{size}.untrained": _cfg(first_conv="patch_embed.0.proj") for size in ("ti", "s", "b")},
    }
)


def _create(
    kind: type[GlobalFilterNet], variant: str, pretrained: bool, settings: dict[str, Any]
) -> GlobalFilterNet:
    features = {
        "feature_cls": "getter",
        "out_indices": settings.pop("out_indices", 3 if kind is GFNet else 4),
    }
    return build_model_with_cfg(kind, variant, pretrained, feature_cfg=features, **settings)


@register_model
def gfnet_ti(pretrained: bool = False, **kwargs: Any) -> GlobalFilterNet:
    """GFNet-Ti, 7 M parameters."""
    return _create(GFNet, "gfnet_ti", pretrained, {"embed_dim": 256, "depth": 12, **kwargs})


@register_model
def gfnet_xs(pretrained: bool = False, **kwargs: Any) -> GlobalFilterNet:
    """GFNet-XS, 16 M parameters."""
    return _create(GFNet, "gfnet_xs", pretrained, {"embed_dim": 384, "depth": 12, **kwargs})


@register_model
def gfnet_s(pretrained: bool = False, **kwargs: Any) -> GlobalFilterNet:
    """GFNet-S, 25 M parameters."""
    return _create(GFNet, "gfnet_s", pretrained, {"embed_dim": 384, "depth": 19, **kwargs})


@register_model
def gfnet_b(pretrained: bool = False, **kwargs: Any) -> GlobalFilterNet:
    """GFNet-B, 43 M parameters."""
    return _create(GFNet, "gfnet_b", pretrained, {"embed_dim": 512, "depth": 19, **kwargs})


@register_model
def gfnet_h_ti(pretrained: bool = False, **kwargs: Any) -> GlobalFilterNet:
    """GFNet-H-Ti, 15 M parameters."""
    return _create(GFNetPyramid, "gfnet_h_ti", pretrained, kwargs)


_H_S = {"embed_dim": (96, 192, 384, 768), "layer_scale": 1e-5}
_H_B = {"embed_dim": (96, 192, 384, 768), "depth": (3, 3, 27, 3), "layer_scale": 1e-6}


@register_model
def gfnet_h_s(pretrained: bool = False, **kwargs: Any) -> GlobalFilterNet:
    """GFNet-H-S, 32 M parameters."""
    return _create(GFNetPyramid, "gfnet_h_s", pretrained, {**_H_S, **kwargs})


@register_model
def gfnet_h_b(pretrained: bool = False, **kwargs: Any) -> GlobalFilterNet:
    """GFNet-H-B, 54 M parameters."""
    return _create(GFNetPyramid, "gfnet_h_b", pretrained, {**_H_B, **kwargs})
