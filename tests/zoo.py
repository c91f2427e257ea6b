"""The small members of timm's families, as the tests share them."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import pytest

from vmkd_fx.zoo.members import MEMBERS, Member, build

__all__ = ["COMMON", "DIVERSE", "MEMBERS", "Member", "build", "by_family"]

DIVERSE = (
    "resnet",
    "vision_transformer",
    "mambaout",
    "efficientnet",
    "qwen3_vit",
)
"""Families that have little in common, for what takes too long to try on all."""

COMMON = (
    *DIVERSE,
    "byobnet",
    "cait",
    "convnext",
    "densenet",
    "edgenext",
    "fastvit",
    "ghostnet",
    "hiera",
    "levit",
    "metaformer",
    "mlp_mixer",
    "mobilevit",
    "repvit",
    "swin_transformer",
    "tiny_vit",
    "volo",
    "xcit",
)
"""Families that between them hold every construction that has ever needed a line of its own."""


def by_family(default: Container[str] = COMMON) -> list[Any]:
    """Every family as a test case: those of `default` in each run, the others under the marker `slow`."""
    return [
        pytest.param(
            member,
            id=member.family,
            marks=() if member.family in default and not member.slow else pytest.mark.slow,
        )
        for member in MEMBERS
    ]
