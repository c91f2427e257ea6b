"""CycleMLP (Chen et al., "CycleMLP: A MLP-like Architecture for Dense Prediction", 2022): a pyramid of MLPs.

Four stages of blocks on (B, H, W, C), overlapping patches before them and 3x3 convolutions of stride 2
between. No layer knows the image's size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vmkd_fx.models.cycle_blocks import CycleBlock, Downsample, OverlappingPatches, Stage

__all__ = ["CycleMlp", "checkpoint_filter_fn"]


class CycleMlp(nn.Module):
    """(B, in_chans, H, W) -> logits (B, num_classes), of any image size; features are (B, H, W, C).

    Args:
        layers: blocks of each stage.
        embed_dims: channels of each stage.
        mlp_ratios: of each stage.
        num_classes: 0 leaves the pooled features.
        in_chans: channels of the images.
        global_pool: of timm's `SelectAdaptivePool2d`; "" leaves the map.
        norm_layer, act_layer: everywhere; LayerNorm with eps 1e-5.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in token mixers and MLPs.
        drop_path_rate: stochastic depth of the last block; it grows linearly from the first.
    """

    def __init__(
        self,
        layers: Sequence[int],
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.output_fmt = "NHWC"
        self.feature_info = []
        self.patch_embed = OverlappingPatches(in_chans, embed_dims[0])
        rates = calculate_drop_path_rates(drop_path_rate, list(layers), stagewise=True)
        stages = []
        for index, (dim, ratio) in enumerate(zip(embed_dims, mlp_ratios, strict=True)):
            down = Downsample(embed_dims[index - 1], dim) if index else nn.Identity()
            blocks = [
                CycleBlock(dim, ratio, norm_layer, act_layer, proj_drop_rate, rate) for rate in rates[index]
            ]
            stages.append(Stage(down, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**index, "module": f"stages.{index}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = embed_dims[-1]
        self.norm = norm_layer(self.num_features)
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, input_fmt=self.output_fmt
        )
        self.head_hidden_size = self.head.num_features
        self.apply(_init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Names of parameters by depth, for layer-wise learning rates."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        last = (r"^norm", (99999,))
        return {
            "stem": r"^patch_embed",
            "blocks": [(r"^stages\.(\d+)", None), last] if coarse else [*fine, last],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes activations instead of keeping them."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; the pooling stays unless another is named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features and the maps (B, C, H, W) of the stages that `indices` names, as timm's models return
        them.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        taken, last = feature_take_indices(len(self.stages), indices)
        found = []
        x = self.patch_embed(x)
        final = len(self.stages) - 1
        index = 0
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if index in taken:
                kept = self.norm(x) if norm and index == final else x
                found.append(kept.permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return found
        return (self.norm(x) if index == final else x), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps named by `indices` do not need; returns their numbers."""
        taken, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if shorter:
            self.num_features = int(self.feature_info[last]["num_chs"])
            self.head.reset(0, "", in_features=self.num_features)
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the normalised last map (B, H / 32, W / 32, C)."""
        return self.norm(self.stages(self.patch_embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The normalised last map -> logits, or what the classifier reads."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Weights under the authors' names (`network.N`, stages and downsamplings in turn) under ours; the
    offsets are structure here and fall away. Ours pass unchanged.
    """
    renamed = {}
    for name, value in state_dict.get("model", state_dict).items():
        if name.endswith(".offset"):
            continue
        if re.search(r"\.sfc_[hw]\.weight$", name):
            value = value.flatten(1)
        name = re.sub(r"^network\.(\d+)\.", lambda found: _place(int(found[1])), name)
        name = name.replace(".attn.", ".token_mixer.")
        renamed[re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)] = value
    return renamed


def _place(number: int) -> str:
    return f"stages.{(number + 1) // 2}.{'downsample' if number % 2 else 'blocks'}."


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "cycle_mlp_b1.untrained": _cfg(),
        "cycle_mlp_b2.untrained": _cfg(),
        "cycle_mlp_b3.untrained": _cfg(),
        "cycle_mlp_b4.untrained": _cfg(crop_pct=0.875),
        "cycle_mlp_b5.untrained": _cfg(crop_pct=0.875),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CycleMlp:
    return build_model_with_cfg(
        CycleMlp,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **kwargs,
    )


@register_model
def cycle_mlp_b1(pretrained: bool = False, **kwargs: Any) -> CycleMlp:
    """CycleMLP-B1: 15.2 M parameters; no weights come with it."""
    return _create("cycle_mlp_b1", pretrained, **{"layers": (2, 2, 4, 2), **kwargs})


@register_model
def cycle_mlp_b2(pretrained: bool = False, **kwargs: Any) -> CycleMlp:
    """CycleMLP-B2: 26.8 M parameters; no weights come with it."""
    return _create("cycle_mlp_b2", pretrained, **{"layers": (2, 3, 10, 3), **kwargs})


@register_model
def cycle_mlp_b3(pretrained: bool = False, **kwargs: Any) -> CycleMlp:
    """CycleMLP-B3: 38.4 M parameters; no weights come with it."""
    arguments = {"layers": (3, 4, 18, 3), "mlp_ratios": (8, 8, 4, 4), **kwargs}
    return _create("cycle_mlp_b3", pretrained, **arguments)


@register_model
def cycle_mlp_b4(pretrained: bool = False, **kwargs: Any) -> CycleMlp:
    """CycleMLP-B4: 51.8 M parameters; no weights come with it."""
    arguments = {"layers": (3, 8, 27, 3), "mlp_ratios": (8, 8, 4, 4), **kwargs}
    return _create("cycle_mlp_b4", pretrained, **arguments)


@register_model
def cycle_mlp_b5(pretrained: bool = False, **kwargs: Any) -> CycleMlp:
    """CycleMLP-B5: 75.7 M parameters; no weights come with it."""
    arguments = {"layers": (3, 4, 24, 3), "embed_dims": (96, 192, 384, 768), **kwargs}
    return _create("cycle_mlp_b5", pretrained, **arguments)
