"""The precision that a graph was asked to be in: what a build is held against. Needs nothing."""

from __future__ import annotations

from dataclasses import dataclass

from vmkd_fx.errors import UnknownNameError

PRECISIONS = ("fp32", "fp16", "bf16", "mixed", "int8", "fp8")


@dataclass(frozen=True)
class Asked:
    """A precision, and the products of matrices that are spared it on purpose.

    Attributes:
        precision: one of `PRECISIONS`.
        kept: names of the spared products, of graph nodes, and, once exported, of ONNX nodes. They are in
            float32; where the precision is of eight bits, in that of the rest of the graph.
    """

    precision: str = "fp32"
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UnknownNameError("precision", self.precision, PRECISIONS)
