"""The table of steps that random networks are made of, with the values of their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests import random_branches, random_layers, random_maths
from tests.random_layers import Made

IMAGES, CHANNELS_LAST, TOKENS = ("nchw",), ("nlc", "nhwc", "nc"), ("nlc",)
ANYWHERE = ("nchw", "nhwc", "nlc", "ncl", "nc")


@dataclass(frozen=True)
class Kind:
    """A sort of step: what makes it, the layouts it takes, and the values that its options may have.

    Attributes:
        branches: how many lists of steps it holds, at least and at most.
    """

    make: Callable[..., Made]
    layouts: tuple[str, ...] = ANYWHERE
    options: Mapping[str, Sequence[Any] | str] = field(default_factory=dict)
    branches: tuple[int, int] = (0, 0)


SEVERAL = "several branches"
"""In place of values: two to four of `BRANCHES`."""

YES = (True, False)
OUT = (4, 6, 8, 12)
KINDS: dict[str, Kind] = {
    "conv": Kind(
        random_layers.convolution,
        IMAGES,
        {
            "out": OUT,
            "kernel": (1, 3, 2, 5),
            "stride": (1, 1, 2, 3),
            "groups": (1, 1, 2, 0),
            "padding": random_layers.PADDINGS,
            "dilation": (1, 1, 1, 2),
            "bias": YES,
            "weight": ("plain",) * 6 + random_layers.WEIGHTS,
        },
    ),
    "transposed": Kind(
        random_layers.transposed,
        IMAGES,
        {"out": OUT, "kernel": (3, 2), "stride": (1, 2), "groups": (1, 2), "bias": YES},
    ),
    "linear": Kind(
        random_layers.linear,
        CHANNELS_LAST,
        {"out": OUT, "bias": YES, "weight": ("plain",) * 6 + random_layers.WEIGHTS},
    ),
    "token linear": Kind(random_layers.token_linear, TOKENS, {"bias": YES, "turned": YES}),
    "batch norm": Kind(
        random_layers.batch_norm,
        ("nchw", "ncl", "nc"),
        {"statistics": ("trained",) * 4 + random_layers.STATISTICS, "eps": (1e-5, 1e-3)},
    ),
    "layer norm": Kind(
        random_layers.layer_norm, ("nlc", "nhwc", "nchw", "nc"), {"affine": (True, True, False), "bias": YES}
    ),
    "group norm": Kind(random_layers.group_norm, ("nchw", "ncl"), {"groups": (1, 2, 0), "affine": YES}),
    "rms norm": Kind(random_layers.rms_norm, CHANNELS_LAST, {"affine": YES}),
    "attention": Kind(
        random_layers.attention,
        TOKENS,
        {"heads": (1, 2), "how": random_layers.ATTENTIONS, "normed": (False, True), "bias": YES},
    ),
    "constant": Kind(
        random_maths.constant,
        ANYWHERE,
        {
            "operation": tuple(random_maths.OPERATIONS),
            "of": ("channel",) * 4 + random_maths.CONSTANTS,
            "negative": (False, True),
        },
    ),
    "affine": Kind(
        random_maths.affine,
        ANYWHERE,
        {"how": ("affine", "timm", "addcmul", "minus", "minus, the other way", "read twice")},
    ),
    "position": Kind(random_maths.position, ANYWHERE, {"learned": YES}),
    "buffer written": Kind(random_maths.buffer_written),
    "act": Kind(random_maths.activation, ANYWHERE, {"of": tuple(random_maths.ACTIVATIONS)}),
    "no op": Kind(
        random_maths.no_op,
        ANYWHERE,
        {"of": ("dropout", "identity", "drop path", "add nothing", "contiguous")},
    ),
    "centre": Kind(random_maths.centre, ANYWHERE, {"over": ("channels", "places")}),
    "moved": Kind(
        random_maths.moved,
        ANYWHERE,
        {"how": ("shuffle", "roll", "roll places", "half", "indexed", "flip")},
    ),
    "pool": Kind(
        random_maths.pool,
        IMAGES,
        {"of": ("average", "maximum", "adaptive"), "padded": (False, True), "counted": YES},
    ),
    "pad": Kind(random_maths.padded, IMAGES, {"value": (0.0, 1.0)}),
    "subsampled": Kind(random_maths.subsampled, IMAGES),
    "class token": Kind(random_maths.class_token, TOKENS),
    "sum": Kind(random_branches.added, ANYWHERE, {"how": tuple(random_branches.SUMS)}, (2, 3)),
    "residual": Kind(random_branches.residual, ANYWHERE, {"how": tuple(random_branches.SUMS)}, (1, 1)),
    "product": Kind(random_branches.product, ANYWHERE, {}, (1, 2)),
    "gate": Kind(random_branches.gate, IMAGES, {"middle": (2, 4), "hard": YES}),
    "concat": Kind(random_branches.concatenated, ANYWHERE, {}, (2, 3)),
    "split": Kind(random_branches.split, ANYWHERE, {"how": ("chunk", "split", "slices")}, (2, 2)),
    "twice": Kind(random_branches.twice, ANYWHERE, {"between": YES}, (1, 1)),
    "parallel": Kind(
        random_branches.parallel,
        IMAGES,
        {
            "names": SEVERAL,
            "out": (0, 4, 8),
            "stride": (1, 2),
        },
    ),
}
