"""RedNet (Li et al., "Involution", 2021): ResNet with 7x7 involutions in its bottlenecks.

The stem is a 3x3 convolution of stride 2, a 3x3 involution and a 3x3 convolution, then a max pooling. The
classifier is ResNet's: mean and one linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vmkd_fx.models.rednet_blocks import Bottleneck, involution_stem

__all__ = ["RedNet", "checkpoint_filter_fn"]

_STAGES = ("layer1", "layer2", "layer3", "layer4")


class RedNet(nn.Module):
    """(B, in_chans, H, W) -> logits (B, num_classes), of any image size.

    Args:
        layers: blocks of each of the four stages.
        num_classes: 0 leaves the pooled features.
        in_chans: channels of the images.
        global_pool: of timm's `SelectAdaptivePool2d`; "" leaves the map.
        stem_width: channels after the stem, a multiple of 32.
        channels: width of each stage's bottlenecks, a multiple of 16 each.
        norm_layer, act_layer: everywhere.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from the first.
        zero_init_last: whether each block begins as its shortcut.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        stem_width: int = 64,
        channels: Sequence[int] = (64, 128, 256, 512),
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        act_layer: type[nn.Module] = nn.ReLU,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.stem = involution_stem(in_chans, stem_width, norm_layer, act_layer)
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1)
        self.feature_info = [{"num_chs": stem_width, "reduction": 2, "module": "stem"}]
        rates = calculate_drop_path_rates(drop_path_rate, list(layers), stagewise=True)
        entering = stem_width
        for index, (name, width, depth) in enumerate(zip(_STAGES, channels, layers, strict=True)):
            blocks = []
            for place in range(depth):
                stride = 2 if index and not place else 1
                blocks.append(Bottleneck(entering, width, stride, norm_layer, act_layer, rates[index][place]))
                entering = width * Bottleneck.expansion
            self.add_module(name, nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": entering, "reduction": 4 * 2**index, "module": name})
        self.num_features = entering
        self.head = ClassifierHead(entering, num_classes, global_pool, drop_rate)
        self.head_hidden_size = self.head.num_features
        self._init_weights(zero_init_last)

    def _init_weights(self, zero_init_last: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Bottleneck) and zero_init_last:
                nn.init.zeros_(module.get_parameter("bn3.weight"))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Names of parameters by depth, for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes activations instead of keeping them."""
        self.grad_checkpointing = enable

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
        """The last map and the maps of the stem (0) and the stages (1 to 4) that `indices` names, as timm's
        models return them.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        taken, last = feature_take_indices(len(_STAGES) + 1, indices)
        x = self.stem(x)
        found = [x] if 0 in taken else []
        x = self.maxpool(x)
        for index, name in enumerate(_STAGES[:last] if stop_early else _STAGES, start=1):
            x = self._through([getattr(self, name)], x)
            if index in taken:
                found.append(x)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps named by `indices` do not need; returns their numbers."""
        taken, last = feature_take_indices(len(_STAGES) + 1, indices)
        for name in _STAGES[last:]:
            setattr(self, name, nn.Sequential())
        if last == 0:
            self.maxpool = nn.Identity()
        if last < len(_STAGES):
            self.num_features = int(self.feature_info[last]["num_chs"])
            self.head.reset(0, "", in_features=self.num_features)
        if prune_head or last < len(_STAGES):
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the last map (B, num_features, ceil(H / 32), ceil(W / 32))."""
        return self._through([getattr(self, name) for name in _STAGES], self.maxpool(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits, or what the classifier reads."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _through(self, stages: list[nn.Module], x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(stages, x, flatten=True)
        for stage in stages:
            x = stage(x)
        return x


_AUTHORS_NAMES = (
    (r"^(model|backbone)\.", ""),
    (r"^classifier\.", "head.fc."),
    (r"^stem\.0\.conv\.", "stem.conv1."),
    (r"^stem\.0\.bn\.", "stem.bn1."),
    (r"^stem\.1\.", "stem.involution."),
    (r"^stem\.2\.", "stem.bn2."),
    (r"^stem\.4\.conv\.", "stem.conv2."),
    (r"^stem\.4\.bn\.", "stem.bn3."),
    (r"\.conv1\.conv\.", ".reduce."),
    (r"\.conv1\.bn\.", ".norm."),
    (r"\.conv2\.conv\.", ".span."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Weights under the authors' names (mmclassification's, or a `model.` and a `classifier.`) under ours;
    ours pass unchanged.
    """
    state = state_dict.get("state_dict", state_dict)
    renamed = {}
    for name, value in state.items():
        for pattern, ours in _AUTHORS_NAMES:
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    return renamed


_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.conv1",
    "classifier": "head.fc",
}
_DEPTHS = {
    26: (1, 2, 4, 1),
    38: (2, 3, 5, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
default_cfgs = generate_default_cfgs({f"rednet{depth}.untrained": _CFG for depth in _DEPTHS})


def _create(depth: int, pretrained: bool, **kwargs: Any) -> RedNet:
    return build_model_with_cfg(
        RedNet,
        f"rednet{depth}",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{"layers": _DEPTHS[depth], **kwargs},
    )


@register_model
def rednet26(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-26: 9.2 M parameters; no weights come with it."""
    return _create(26, pretrained, **kwargs)


@register_model
def rednet38(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-38: 12.4 M parameters; no weights come with it."""
    return _create(38, pretrained, **kwargs)


@register_model
def rednet50(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-50: 15.5 M parameters; no weights come with it."""
    return _create(50, pretrained, **kwargs)


@register_model
def rednet101(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-101: 25.6 M parameters; no weights come with it."""
    return _create(101, pretrained, **kwargs)


@register_model
def rednet152(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-152: 34.0 M parameters; no weights come with it."""
    return _create(152, pretrained, **kwargs)
