"""The parts of CycleMLP (Chen et al., 2022), all on maps (B, H, W, C)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath, Mlp
from timm.models import checkpoint_seq
from torch import Tensor, nn

from vmkd_fx.models.cycle_fc import CycleFC

__all__ = ["CycleBlock", "CycleMixer", "Downsample", "OverlappingPatches", "Stage"]


class CycleMixer(nn.Module):
    """Token mixer (Chen et al.): Cycle FCs along both axes and a channel FC, summed with weights
    that each image sets for each channel (softmax over the three).

    The authors' `sfc_h` is the one whose kernel is (1, 3): it shifts along the width. Names follow theirs.
    """

    def __init__(self, dim: int, size: int = 3, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.mlp_c = nn.Linear(dim, dim, bias=False)
        self.sfc_h = CycleFC(dim, dim, (1, size))
        self.sfc_w = CycleFC(dim, dim, (size, 1))
        self.reweight = Mlp(dim, dim // 4, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        h, w, c = self.sfc_h(x), self.sfc_w(x), self.mlp_c(x)  # (B, H, W, C) each
        shares = self.reweight((h + w + c).mean((1, 2)))  # (B, C * 3)
        of_h, of_w, of_c = shares.reshape(-1, 1, 1, self.dim, 3).softmax(-1).unbind(-1)
        return self.proj_drop(self.proj(h * of_h + w * of_w + c * of_c))


class CycleBlock(nn.Module):
    """Token mixer and MLP, each behind a norm and beside a shortcut; (B, H, W, C) throughout."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.token_mixer = CycleMixer(dim, proj_drop=proj_drop)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.token_mixer(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class OverlappingPatches(nn.Module):
    """Overlapping patches of an image (B, in_chans, H, W) as (B, H / 4, W / 4, C)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 7, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 on (B, H, W, C)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """A downsampling, or none, and blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
