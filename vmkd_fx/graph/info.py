"""What a model says about itself: name, classes, input size, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from timm.models import get_model_args
from timm.models._input import get_model_input_config
from torch import nn

from vmkd_fx.errors import ModelError
from vmkd_fx.frames import Frames

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelInfo:
    """Facts that a graph alone does not hold.

    Attributes:
        name: timm architecture name, else the class name.
        num_classes: length of the logits; None if the model does not say.
        input_size: (C, H, W) of one image; None if the model does not say.
        mean, std: normalisation the model was made for, one value a channel.
        interpolation, crop_pct, crop_mode: of its evaluation transform, in timm's terms.
        num_prefix_tokens: class, distillation and register tokens before the patches.
        fixed_input_size: whether other image sizes are refused by the model.
        options: keyword arguments that timm made it with, as far as timm remembers them.
        frames: what a lowered graph takes instead of normalised images; None for those.
    """

    name: str
    num_classes: int | None = None
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    num_prefix_tokens: int = 0
    fixed_input_size: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    frames: Frames | None = None

    def need_input_size(self) -> tuple[int, int, int]:
        """The input size, or an error that says how to give it."""
        if self.input_size is None:
            raise ModelError(
                f"{self.name} does not say how large its images are: trace(model, input_size=(3, 224, 224))"
            )
        return self.input_size


def model_info(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> ModelInfo:
    """Read `ModelInfo` from a timm model's attributes, or as far as possible from any module.

    `input_size`, if given, wins over what the model says.
    """
    if isinstance(info := getattr(model, "info", None), ModelInfo):
        return info if input_size is None else replace(info, input_size=input_size)
    config = _config(model)
    size = input_size or _input_size(model, config)
    return ModelInfo(
        name=config.get("architecture") or type(model).__name__,
        num_classes=getattr(model, "num_classes", None),
        input_size=size,
        mean=_for_each_channel(config.get("mean", IMAGENET_MEAN), size),
        std=_for_each_channel(config.get("std", IMAGENET_STD), size),
        interpolation=config.get("interpolation") or "bicubic",
        crop_pct=config.get("crop_pct") or 0.875,
        crop_mode=config.get("crop_mode") or "center",
        num_prefix_tokens=getattr(model, "num_prefix_tokens", 0) or 0,
        fixed_input_size=bool(config.get("fixed_input_size", False)),
        options=get_model_args(model),
    )


def _for_each_channel(values: Sequence[float], size: tuple[int, int, int] | None) -> tuple[float, ...]:
    """One value a channel; the mean of the published ones where there are other channels than those."""
    if size is None or len(values) == size[0]:
        return tuple(values)
    return (sum(values) / len(values),) * size[0]


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    return config if isinstance(config, dict) else config.to_dict()


def _input_size(model: nn.Module, config: dict[str, Any]) -> tuple[int, int, int] | None:
    """The size that the model was made for, else the published one, which `img_size=` leaves unchanged."""
    if hasattr(model, "_traits") and (made_for := get_model_input_config(model).get("input_size")):
        return tuple(made_for)
    published = config.get("input_size")
    channels = getattr(model, "in_chans", None) or (published or (None,))[0] or _stem_channels(model)
    for module in model.modules():
        size = getattr(module, "img_size", None)
        size = (size, size) if isinstance(size, int) else size
        if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(edge, int) for edge in size):
            return (channels, *size)
    return (channels, *published[1:]) if published else None


def _stem_channels(model: nn.Module) -> int:
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    stem = next(convolutions, None)
    return stem.in_channels if stem is not None else 3
