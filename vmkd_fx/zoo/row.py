"""What a sweep finds out about one model: a row of the coverage table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

UNKNOWN = "unknown"


@dataclass
class Row:
    """One model. Findings are empty strings where all is well, else the reason.

    Attributes:
        model, family: timm's name and the module of timm that it comes from.
        parameters, nodes: of the model and of its graph.
        trace: the trace, and a run of the graph in both modes on images.
        closed: modules that stayed closed and hide parameters, or were closed for a failure: path and reason.
        fixed_size: where the size of the images decides the graph's course; empty where it holds for any.
        open_share: of the parameters in Linear, convolution and norm layers, the share whose layer is a node.
        blocks, stages: how many there are.
        unclear: how many branches nobody can say of whether they mix tokens.
        timm: agreement with what timm knows about its features; "unknown" where timm knows nothing.
        methods: for each method the requirement that the model does not meet.
        round_trip: for each injection that applies, what `strip` did not give back.
        numbers: for each check on real numbers what differed, empty strings where nothing did; no entries
            where none were made.
        seconds: of creating, tracing and understanding the model.
    """

    model: str
    family: str
    parameters: int = 0
    nodes: int = 0
    trace: str = "not reached"
    closed: list[tuple[str, str]] = field(default_factory=list)
    fixed_size: str = ""
    open_share: float = 0.0
    blocks: int = 0
    stages: int = 0
    unclear: int = 0
    timm: str = "not reached"
    methods: dict[str, str] = field(default_factory=dict)
    round_trip: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def faults(self) -> dict[str, str]:
        """Everything that is not as it should be."""
        found = {"trace": self.trace, "timm": "" if self.timm == UNKNOWN else self.timm}
        found |= {f"round trip of {name}": reason for name, reason in self.round_trip.items()}
        found |= self.numbers
        if self.open_share < 0.99 and not self.trace:
            found["open share"] = f"{100 * self.open_share:.1f} % of the layers' parameters are open nodes"
        return {name: reason for name, reason in found.items() if reason}

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """The inverse of `to_json`."""
        return cls(**{**data, "closed": [tuple(pair) for pair in data["closed"]]})
