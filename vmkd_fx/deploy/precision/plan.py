"""Which nodes of a graph compute in half, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.fx import Node

from vmkd_fx.deploy.precision.ranges import Reach
from vmkd_fx.deploy.precision.rules import (
    ARITHMETIC,
    AVERAGE,
    LARGE,
    MOVE,
    POINTWISE,
    PRODUCT,
    SINGLE,
    STATISTIC,
    Rule,
    operator_name,
    rule_of,
)
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import attribute

SENSITIVE = 8.0
"""A product is sensitive where rounding its operands moves it by this many units in the last place."""

_STREAM = "stream"
_SUMS = ("add", "sub")


@dataclass(frozen=True)
class Limits:
    """What a precision can hold and what is asked of it.

    Attributes:
        dtype: torch.float16 or torch.bfloat16.
        margin: a value is thought to reach this much further than measured.
        streams: residual streams stay float32, and so do sensitive products.
    """

    dtype: torch.dtype
    margin: float
    streams: bool = False

    def fits(self, largest: float) -> bool:
        """Whether a value that was seen to reach this far stays finite."""
        return largest * self.margin <= torch.finfo(self.dtype).max

    def rounds(self, tensor: torch.Tensor) -> float:
        """How far rounding moves a tensor of the model, relative, in the mean square."""
        exact = tensor.detach().double()
        finite = torch.isfinite(exact)
        exact = exact[finite]
        scale = float(exact.square().sum().sqrt())
        moved = float((tensor.detach()[finite].to(self.dtype).double() - exact).square().sum().sqrt())
        return moved / scale if scale else 0.0


@dataclass
class Plan:
    """The precision of every node that computes real numbers.

    Attributes:
        half: nodes that compute in half.
        single: nodes that compute in float32, each with the reason.
    """

    half: set[Node] = field(default_factory=set)
    single: dict[Node, str] = field(default_factory=dict)


class Planner:
    """Goes through a graph once in its order, and once back for what only moves values."""

    def __init__(self, module: TracedModule, reach: dict[str, Reach], limits: Limits) -> None:
        self.plan = Plan()
        self._module = module
        self._reach = reach
        self._limits = limits
        self._state: dict[Node, str] = {}  # of float32 nodes: why what reads them may have to follow
        self._rounding: dict[str, float] = {}

    def __call__(self) -> Plan:
        nodes = [node for node in self._module.graph.nodes if node.op == "call_function"]
        for node in nodes:
            self._decide(node)
        for node in reversed(nodes):
            if self._moves(node) and node in self.plan.single and operator_name(node) != "getitem":
                self._follow_readers(node)
        return self.plan

    def _decide(self, node: Node) -> None:
        rule = rule_of(node)
        decision = self._as_part_of_another(node) or self._by_range(node, rule) or self._by_rule(node, rule)
        if decision is None:
            self.plan.half.add(node)
        else:
            self.plan.single[node], self._state[node] = decision

    def _as_part_of_another(self, node: Node) -> tuple[str, str] | None:
        """A piece has the precision of what it is a piece of."""
        parent = node.args[0] if node.args else None
        if operator_name(node) != "getitem" or parent not in self.plan.single:
            return None
        assert isinstance(parent, Node)
        return self.plan.single[parent], self._state[parent]

    def _by_range(self, node: Node, rule: Rule) -> tuple[str, str] | None:
        """The reason why `node` cannot be in half whatever it computes."""
        if rule.kind in (SINGLE, STATISTIC):
            return None
        for source in self._computed(node):
            if not self._limits.fits(self._reach[source.name].largest):
                return f"reads values up to {self._reach[source.name].largest:.1e}", ""
        largest = self._reach[node.name].largest if node.name in self._reach else 0.0
        if not self._limits.fits(largest):
            return f"reaches {largest:.1e}", ""
        return self._by_constants(node, rule)

    def _by_constants(self, node: Node, rule: Rule) -> tuple[str, str] | None:
        for source in node.all_input_nodes:
            tensor = self._constant(source)
            if tensor is None:
                continue
            largest = float(tensor[torch.isfinite(tensor)].abs().max()) if tensor.numel() else 0.0
            if largest > torch.finfo(self._limits.dtype).max:
                return f"reads weights up to {largest:.1e}", ""
            if rule.kind == PRODUCT and tensor.ndim > 1:
                moved = self._rounds(source, tensor)
                if moved > torch.finfo(self._limits.dtype).eps:
                    return f"rounding moves its weights by {moved:.1e}", ""
        if rule.kind in (ARITHMETIC, POINTWISE):
            for number in _numbers(node):
                if self._limits.rounds(number) > torch.finfo(self._limits.dtype).eps:
                    return f"the number {float(number):.1e} does not fit", ""
        return None

    def _rounds(self, source: Node, tensor: torch.Tensor) -> float:
        path = str(source.target)
        if path not in self._rounding:
            self._rounding[path] = self._limits.rounds(tensor)
        return self._rounding[path]

    def _by_rule(self, node: Node, rule: Rule) -> tuple[str, str] | None:
        if rule.kind == SINGLE:
            return rule.reason, ""
        if rule.kind == STATISTIC or (rule.kind == AVERAGE and self._averaged(node) > LARGE):
            return rule.reason, STATISTIC
        if rule.kind == PRODUCT:
            return self._product(node)
        computed = self._computed(node)
        single = [source for source in computed if source in self._state]
        if self._limits.streams and (_sums_two(node, computed, self._reach) or self._goes_on(computed)):
            return "a residual stream", _STREAM
        if rule.kind in (ARITHMETIC, POINTWISE) and any(self._state[s] == STATISTIC for s in single):
            whole = len(single) == len(computed)
            return "arithmetic on statistics", STATISTIC if whole else ""
        if self._moves(node) and single and len(single) == len(computed):
            return "moves float32 values", self._state[single[0]]
        return None

    def _product(self, node: Node) -> tuple[str, str] | None:
        bound = SENSITIVE * torch.finfo(self._limits.dtype).eps
        moved = self._reach[node.name].rounding if node.name in self._reach else 0.0
        return (f"rounding its operands moves it by {moved:.1e}", "") if moved > bound else None

    def _goes_on(self, computed: list[Node]) -> bool:
        """Whether a stream passes through a node that reads nothing else."""
        return bool(computed) and all(self._state.get(source) == _STREAM for source in computed)

    def _follow_readers(self, node: Node) -> None:
        """Half where all readers are: what is moved is half as long then."""
        if self._state.get(node) in (STATISTIC, _STREAM) or self.plan.single[node] != "moves float32 values":
            return
        pieces = [user for user in node.users if operator_name(user) == "getitem"]
        readers = [reader for piece in pieces for reader in piece.users]
        readers += [user for user in node.users if user not in pieces]
        if readers and all(reader in self.plan.half for reader in readers):
            for moved in (node, *pieces):
                del self.plan.single[moved]
                self.plan.half.add(moved)

    def _moves(self, node: Node) -> bool:
        return rule_of(node).kind == MOVE or operator_name(node) in ("cat", "stack")

    def _computed(self, node: Node) -> list[Node]:
        """The real numbers that a node reads and that images reach."""
        return [
            source
            for source in node.all_input_nodes
            if source.op != "get_attr" and source.name in self._reach and self._reach[source.name].floating
        ]

    def _constant(self, node: Node) -> torch.Tensor | None:
        if node.op != "get_attr":
            return None
        value = attribute(self._module, str(node.target))
        real = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.detach() if real else None

    def _averaged(self, node: Node) -> int:
        """Over how many values an average goes."""
        source: Any = node.args[0]
        if operator_name(node).startswith("avg_pool"):
            kernel: Any = node.args[1]
            return prod(kernel) if len(kernel) > 1 else kernel[0] ** int(operator_name(node)[-2])
        return prod(self._reach[source.name].shape) // max(1, prod(self._reach[node.name].shape))


def _sums_two(node: Node, computed: list[Node], reach: dict[str, Reach]) -> bool:
    """Whether a node adds two computed values of one shape, as residual streams do."""
    return operator_name(node) in _SUMS and len({reach[source.name].shape for source in computed}) == 1 < len(
        computed
    )


def _numbers(node: Node) -> list[torch.Tensor]:
    """The finite numbers among what a node is given."""
    given = [*node.args, *node.kwargs.values()]
    numbers = [x for x in given if isinstance(x, (int, float)) and not isinstance(x, bool)]
    return [torch.tensor(float(x), dtype=torch.float64) for x in numbers if abs(x) != float("inf")]
