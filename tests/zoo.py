"""The small members of timm's families, as the tests share them."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import pytest

from vmkd_fx.zoo.members import MEMBERS, Member, build

__all__ = ["DIVERSE", "MEMBERS", "VARIED", "Member", "build", "by_family"]

DIVERSE = (
    "resnet",
    "vision_transformer",
    "mambaout",
    "efficientnet",
    "qwen3_vit",
)
"""Families that have little in common, for what takes too long to try on all."""

VARIED = (*DIVERSE, "byobnet", "cait", "ghostnet", "metaformer", "mlp_mixer", "swin_transformer", "tiny_vit")
"""Families that between them hold most constructions that have needed a line of their own."""


def by_family(default: Container[str]) -> list[Any]:
    """Every family as a test case: those of `default` in each run, the others under the marker `slow`."""
    return [
        pytest.param(
            member,
            id=member.family,
            marks=() if member.family in default and not member.slow else pytest.mark.slow,
        )
        for member in MEMBERS
    ]
