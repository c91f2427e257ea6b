"""Images as a camera or a decoder hands them over: bytes, and the order of their axes.

A model is trained on (x / 255 - mean) / std. A graph that takes frames computes that itself, so whoever runs
it moves a quarter of the bytes and does no arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vmkd_fx.errors import ModelError, UnknownNameError

DTYPES = ("uint8",)
LAYOUTS = ("nhwc", "nchw")


@dataclass(frozen=True)
class Frames:
    """Unsigned bytes 0..255 as a graph's input.

    Attributes:
        layout: "nhwc" for (B, H, W, C), as cameras and image files have them, or "nchw" for (B, C, H, W).
        mean, std: one value a channel, for pixels in 0..1; None for those that the model was made for.

    `str(frames)` is the text that `parse_frames` reads; it leaves mean and std out.

    Raises:
        UnknownNameError: there is no such layout.
        ModelError: mean or std is no row of finite numbers, or a std is not positive.
    """

    layout: str = "nhwc"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UnknownNameError("layout of frames", self.layout, LAYOUTS)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is None:
                continue
            values = tuple(values)
            object.__setattr__(self, name, values)
            if not values or not all(_finite(value) and (name == "mean" or value > 0) for value in values):
                kind = "finite" if name == "mean" else "finite and positive"
                raise ModelError(f"frames: {name} must be {kind} numbers, one a channel, found {values}")

    def __str__(self) -> str:
        return f"{DTYPES[0]}:{self.layout}"

    def shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Of one frame, for images of size (C, H, W)."""
        channels, height, width = size
        return (height, width, channels) if self.layout == "nhwc" else (channels, height, width)


def parse_frames(text: str | Frames) -> Frames:
    """Read "uint8", which is "uint8:nhwc", or "uint8:nchw"; frames themselves pass as they are.

    Raises:
        UnknownNameError: another data type or layout.
    """
    if isinstance(text, Frames):
        return text
    dtype, colon, layout = text.strip().lower().partition(":")
    if dtype not in DTYPES:
        raise UnknownNameError("data type of frames", dtype, DTYPES, where=f"frames {text!r}")
    if colon and layout not in LAYOUTS:
        raise UnknownNameError("layout of frames", layout, LAYOUTS, where=f"frames {text!r}")
    return Frames(layout) if colon else Frames()


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
