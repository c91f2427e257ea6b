"""What GFNet's two forms share: the layers around the blocks, and the interface of timm's models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vmkd_fx.errors import ModelError
from vmkd_fx.models.global_filter import Grid

__all__ = ["GlobalFilterNet"]


class GlobalFilterNet(nn.Module):
    """Embedding, position embedding, blocks, final norm, pooling over tokens, classifier.

    Args:
        patch_embed: the embedding, or a list of them, one before each item of `blocks`.
        blocks: blocks, or stages of blocks; each is one feature.
        grids: (H, W) in tokens behind each item of `blocks`.
        feature_info: of each item of `blocks`.
        num_classes, global_pool: of the head; "avg" or "" for no pooling.
        drop_rate, pos_drop_rate: dropout before the classifier and behind the position embedding.
    """

    norm: nn.Module
    global_pool: str

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: nn.ModuleList,
        grids: Sequence[Grid],
        feature_info: list[dict[str, Any]],
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = grids[0]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = feature_info[-1]["num_chs"]
        self.grids, self.feature_info = tuple(grids), feature_info
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        self.pos_embed = nn.Parameter(torch.zeros(1, height * width, feature_info[0]["num_chs"]))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = blocks
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Parameters that decay leaves alone."""
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layers for a learning rate each; `coarse` has a hierarchical model's stages as layers."""
        whole = (r"^(?:patch_embed|blocks)\.(\d+)", None)
        each = [(r"^patch_embed\.(\d+)", (0,)), (r"^blocks\.(\d+)\.(\d+)\.", None)]
        layers = [*([] if coarse else each), whole, (r"^norm", (99999,))]
        return {"stem": r"^pos_embed|^patch_embed\.(?:proj|0\.)", "blocks": layers}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training computes the inside of blocks again instead of keeping it."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer; none for 0 classes.

        Raises:
            ModelError: a pooling other than "avg" and "".
        """
        if global_pool not in (None, "", "avg"):
            raise ModelError(f"global_pool is {global_pool!r}; tokens are pooled by 'avg', or not: ''")
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        classifier = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = classifier.to(self.pos_embed).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features behind blocks, or behind stages: timm's method.

        Args:
            x: images (B, 3, H, W).
            indices: the last n, these, or all.
            norm: send features as wide as the last through the final norm.
            stop_early: compute nothing behind the last feature that was asked for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: leave out the final features.

        Returns:
            A list of features; with the final features (B, N, C) before it, unless they are left out.

        Raises:
            ModelError: another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ModelError(f"output_fmt is {output_fmt!r}; features come as 'NCHW' or 'NLC'")
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        found = []
        for index, (embed, blocks) in enumerate(self._parts()):
            if stop_early and index > last:
                break
            x = self._run(x, index, embed, blocks)
            if index in wanted:
                fits = norm and self.feature_info[index]["num_chs"] == self.num_features
                feature = self.norm(x) if fits else x
                if output_fmt == "NCHW":
                    feature = feature.transpose(1, 2).unflatten(2, self.grids[index]).contiguous()
                found.append(feature)
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what lies behind the last of the features `indices`; returns their places."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        self.blocks = self.blocks[: last + 1]
        if isinstance(self.patch_embed, nn.ModuleList):
            self.patch_embed = self.patch_embed[: last + 1]
        width = self.feature_info[last]["num_chs"]
        if prune_norm or width != self.num_features:
            self.norm = nn.Identity()
        if prune_head or width != self.num_features:
            self.num_features = self.head_hidden_size = width
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, N, C) behind the final norm."""
        for index, (embed, blocks) in enumerate(self._parts()):
            x = self._run(x, index, embed, blocks)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits, or to what the classifier reads."""
        if self.global_pool == "avg":
            x = x.mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _parts(self) -> Iterable[tuple[nn.Module | None, nn.Module]]:
        """Each item of `blocks` with the embedding before it, if there is one."""
        embeds = self.patch_embed if isinstance(self.patch_embed, nn.ModuleList) else [self.patch_embed]
        return zip_longest(embeds, self.blocks)

    def _run(self, x: Tensor, index: int, embed: nn.Module | None, blocks: nn.Module) -> Tensor:
        x = x if embed is None else embed(x)
        if index == 0:
            x = self.pos_drop(x + self.pos_embed)
        if not self.grad_checkpointing:
            return blocks(x)
        return checkpoint_seq(blocks, x) if isinstance(blocks, nn.Sequential) else checkpoint(blocks, x)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
