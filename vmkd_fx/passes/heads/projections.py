"""Projections to the teacher's width (FitNet, SRRL, module imitation) and MGD's generator."""

from __future__ import annotations

import torch
from torch import nn

from vmkd_fx.errors import RecipeError, UnknownNameError
from vmkd_fx.passes.heads.features import LAYOUTS, to_map

MASKED = ("channels", "locations")


class FitNetProjection(nn.Module):
    """The regressor r of FitNet's hint loss (Romero et al., 2015, Eq. 3) as a 1 x 1 convolution, or a linear
    layer where channels are last: (..., C_student) to (..., C_teacher) in the feature's own layout.

    Args:
        student_dim, teacher_dim: widths.
        layout: "NCHW", "NHWC" or "NLC".
    """

    def __init__(self, student_dim: int, teacher_dim: int, layout: str = "NLC") -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise UnknownNameError("layout", layout, LAYOUTS)
        self.layout = layout
        self.project: nn.Module = (
            nn.Conv2d(student_dim, teacher_dim, 1)
            if layout == "NCHW"
            else nn.Linear(student_dim, teacher_dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x)


class MGDGenerator(nn.Module):
    """A student's feature map, partly masked, to the teacher's (Masked Generative Distillation, Yang et al.,
    2022): a 1 x 1 convolution to the teacher's width, zeros in place of what is masked, two 3 x 3
    convolutions with a ReLU between them.

    Each channel, or each location, is masked with probability `ratio`, so a draw may mask all of them or
    none; the loss divides by neither. In train() the mask is drawn at each call; in eval() nothing is masked.

    Args:
        student_dim, teacher_dim: widths; equal ones need no 1 x 1 convolution.
        ratio: λ, 0.15 for classification.
        along: what is masked: "channels" (classification) or "locations" (detection and segmentation).
        layout, grid, prefix_tokens: of the student's feature, see `vmkd_fx.passes.heads.to_map`.

    Raises:
        RecipeError: the ratio is not between 0 and 1.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        ratio: float = 0.15,
        along: str = "channels",
        layout: str = "NCHW",
        grid: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        if along not in MASKED:
            raise UnknownNameError("mask", along, MASKED)
        if not 0 < ratio < 1:
            found = "masks none" if ratio == 0 else "leaves nothing" if ratio == 1 else "is no share"
            raise RecipeError(f"a mask ratio of {ratio} {found}; MGD takes one between 0 and 1, such as 0.15")
        self.ratio, self.along = ratio, along
        self.layout, self.grid, self.prefix_tokens = layout, grid, prefix_tokens
        self.align = nn.Conv2d(student_dim, teacher_dim, 1) if student_dim != teacher_dim else nn.Identity()
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1),
        )

    def forward(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The feature in its own layout, C_student wide, to a map (B, C_teacher, H, W).

        Args:
            noise: uniform in [0, 1), (B, C_teacher, 1, 1) or (B, 1, H, W); masked where it is below the
                ratio. None draws it.
        """
        x = self.align(to_map(x, self.layout, self.grid, self.prefix_tokens))
        if noise is None and self.training:
            batch, channels, height, width = x.shape
            shape = (batch, channels, 1, 1) if self.along == "channels" else (batch, 1, height, width)
            noise = torch.rand(shape, device=x.device)
        return self.generation(x if noise is None else x * (noise >= self.ratio))


class WeakClassifier(nn.Module):
    """USKD's second classifier, on an earlier feature: (B, C), tokens (B, N, C) or a map (B, C, H, W),
    averaged over its locations, to logits (B, classes).
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 4:
            x = x.mean((2, 3))
        elif x.ndim == 3:
            x = x.mean(1)
        return self.fc(x)
