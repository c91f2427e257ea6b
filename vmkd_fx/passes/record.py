"""What a pass is, and what it gives back beside the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.steps import Refusal


@dataclass(frozen=True)
class Record:
    """What a lowering pass did: how many sites it rewrote, in words, and what it left alone and why."""

    matched: int
    detail: str = ""
    refused: tuple[Refusal, ...] = ()


LoweringPass = Callable[[TracedModule], tuple[TracedModule, Record]]
"""Takes a graph with parameters of its own, which it may change, and returns the graph to go on with."""
