"""The parts of RedNet (Li et al., "Involution", 2021)."""

from __future__ import annotations

from collections import OrderedDict

from timm.layers import DropPath
from torch import Tensor, nn

from vmkd_fx.models.involution import Involution2d

__all__ = ["Bottleneck", "involution_stem"]


class Bottleneck(nn.Module):
    """1x1 convolution, 7x7 involution, 1x1 convolution to four times the width, beside a shortcut.

    The involution carries the stride; the shortcut is a 1x1 convolution where the shape changes.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        act_layer: type[nn.Module] = nn.ReLU,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        self.act1 = act_layer()
        self.conv2 = Involution2d(width, 7, stride, norm_layer=norm_layer, act_layer=act_layer)
        self.bn2 = norm_layer(width)
        self.act2 = act_layer()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm_layer(out_channels)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, norm_layer(out_channels))
        self.act3 = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        y = self.drop_path(self.bn3(self.conv3(y)))
        return self.act3(y + self.downsample(x))


def involution_stem(
    in_chans: int, width: int, norm_layer: type[nn.Module], act_layer: type[nn.Module]
) -> nn.Sequential:
    """(B, in_chans, H, W) -> (B, width, H / 2, W / 2): 3x3 convolution of stride 2, 3x3 involution, 3x3
    convolution.
    """
    half = width // 2
    involution = Involution2d(half, 3, norm_layer=norm_layer, act_layer=act_layer)
    parts: list[tuple[str, nn.Module]] = [
        *[("conv1", nn.Conv2d(in_chans, half, 3, 2, 1, bias=False)), ("bn1", norm_layer(half))],
        *[
            ("act1", act_layer()),
            ("involution", involution),
            ("bn2", norm_layer(half)),
            ("act2", act_layer()),
        ],
        *[("conv2", nn.Conv2d(half, width, 3, 1, 1, bias=False)), ("bn3", norm_layer(width))],
        ("act3", act_layer()),
    ]
    return nn.Sequential(OrderedDict(parts))
