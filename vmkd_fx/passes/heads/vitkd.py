"""What ViTKD trains beside the student: the alignment of shallow features and the generator of the deep one.

Mimicking (Eq. 1): fc(F_S), a linear layer to the teacher's width. Generation (Eq. 2 to 4): align to the
teacher's width, put a learnable token in place of the masked ones, and let a generative block fill them in.
Table 7 compares three: a convolutional projector (the best), self-attention and cross-attention.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import nn

from vmkd_fx.errors import ModelError, RecipeError, UnknownNameError
from vmkd_fx.passes.heads.features import square, to_tokens
from vmkd_fx.passes.heads.masking import kept_tokens, token_mask

GENERATORS = ("conv", "self_attention", "cross_attention")


def alignment(student_dim: int, teacher_dim: int) -> nn.Module:
    """A linear layer from one width to the other; nothing where they agree, as in the authors' code."""
    return nn.Linear(student_dim, teacher_dim) if student_dim != teacher_dim else nn.Identity()


class ViTKDMimic(nn.Module):
    """A student's shallow feature in the teacher's width: fc of Eq. 1, one for each block that is mimicked.

    Args:
        student_dim, teacher_dim: widths. Equal ones need no layer and there is none.
        layout, prefix_tokens: of the student's feature, see `vmkd_fx.graph.parts.Block`.
    """

    def __init__(
        self, student_dim: int, teacher_dim: int, layout: str = "NLC", prefix_tokens: int = 0
    ) -> None:
        super().__init__()
        self.layout, self.prefix_tokens = layout, prefix_tokens
        self.align = alignment(student_dim, teacher_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The feature in its own layout to patch tokens (B, N, teacher_dim)."""
        return self.align(to_tokens(x, self.layout, self.prefix_tokens))


class ViTKDGenerator(nn.Module):
    """A student's deep feature, partly masked, to the teacher's (Eq. 2 to 4).

    In train() a mask is drawn from torch's generator at each call; in eval() nothing is masked.

    Args:
        kind: "conv", two 3 x 3 convolutions with a ReLU between them on the grid of patches;
            "self_attention", a transformer block over all tokens; "cross_attention", a block whose queries
            are mask tokens and whose keys are the kept tokens. Those two see learnable positions.
        student_dim, teacher_dim: widths.
        grid: patches (height, width), or their number N if they are a square.
        ratio: λ, the share of masked tokens; N - int(N (1 - λ)) are masked.
        heads: of the attention; None: one for each 64 channels where that divides the width, else one.
        layout, prefix_tokens: of the student's feature.

    Raises:
        UnknownNameError: there is no such kind.
        RecipeError: the ratio leaves no token or masks none, or the heads do not divide the width.
    """

    def __init__(
        self,
        kind: str,
        student_dim: int,
        teacher_dim: int,
        grid: tuple[int, int] | int,
        ratio: float = 0.5,
        heads: int | None = None,
        layout: str = "NLC",
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        if kind not in GENERATORS:
            raise UnknownNameError("generator", kind, GENERATORS)
        self.grid = square(grid) if isinstance(grid, int) else tuple(grid)
        self.tokens = self.grid[0] * self.grid[1]
        self.kept = kept_tokens(self.tokens, ratio)
        self.kind, self.ratio = kind, ratio
        self.layout, self.prefix_tokens = layout, prefix_tokens
        self.align = alignment(student_dim, teacher_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, teacher_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.generation: nn.Module
        if kind == "conv":
            self.generation = ConvProjector(teacher_dim)
        else:
            self.generation = AttentionGenerator(
                teacher_dim, self.tokens, _heads(teacher_dim, heads), cross=kind == "cross_attention"
            )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The feature in its own layout to (generated, mask).

        Args:
            mask: (B, N), 1 or True where a token is masked, each sample with a token that is not; None
                draws one.

        Returns:
            The generated tokens (B, N, teacher_dim), and the mask (B, N), 1 where a token was masked.

        Raises:
            ModelError: there are not as many tokens as the grid has patches.
        """
        tokens = self.align(to_tokens(x, self.layout, self.prefix_tokens))
        if tokens.shape[1] != self.tokens:
            raise ModelError(
                f"the generator was made for {self.grid[0]} x {self.grid[1]} patches and the feature has "
                f"{tokens.shape[1]} tokens; make it with the grid of the student's images"
            )
        if mask is None:
            mask = self._drawn(tokens)
        mask = mask.to(tokens.dtype)
        masked = mask.bool()
        token = self.mask_token.to(tokens.dtype)
        if self.kind == "conv":
            filled = torch.where(masked[..., None], token, tokens)
            return self.generation(filled, self.grid), mask
        return self.generation(tokens, token, masked), mask

    def _drawn(self, tokens: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return tokens.new_zeros(tokens.shape[:2])
        noise = torch.rand(tokens.shape[:2], device=tokens.device)
        return token_mask(noise, self.kept).mask


class ConvProjector(nn.Module):
    """Two 3 x 3 convolutions with a ReLU between them: tokens (B, N, C) on their grid to the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        image = x.transpose(1, 2).unflatten(2, grid)
        return self.conv2(self.act(self.conv1(image))).flatten(2).transpose(1, 2)


class AttentionGenerator(nn.Module):
    """A pre-norm transformer block that fills in masked tokens.

    With `cross` the queries are the mask token at each position and see the kept tokens alone; without, all
    tokens see each other, mask tokens in place of the masked ones.
    """

    def __init__(self, dim: int, tokens: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        self.position = nn.Parameter(torch.empty(1, tokens, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.norm1 = nn.LayerNorm(dim)
        self.norm_kept = nn.LayerNorm(dim) if cross else nn.Identity()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, mask_token: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, C), the mask token (1, 1, C) and the mask (B, N), True where masked, to (B, N, C)."""
        if self.cross:
            stream = (mask_token + self.position).expand(x.shape[0], -1, -1)
            keys = self.norm_kept(x + self.position)
            hidden: torch.Tensor | None = masked
        else:
            stream = torch.where(masked[..., None], mask_token, x) + self.position
            keys, hidden = self.norm1(stream), None
        seen, _ = self.attention(self.norm1(stream), keys, keys, key_padding_mask=hidden, need_weights=False)
        stream = stream + seen
        return self.project(stream + self.mlp(self.norm2(stream)))


def _heads(dim: int, heads: int | None) -> int:
    if heads is None:
        return dim // 64 if dim % 64 == 0 else 1
    if heads < 1 or dim % heads:
        fits = [n for n in range(1, dim + 1) if dim % n == 0 and n <= 64]
        raise RecipeError(f"{heads} heads do not divide {dim} channels; {', '.join(map(str, fits))} do")
    return heads
