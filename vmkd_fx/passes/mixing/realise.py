"""Put a realisation in the place of every circulant mixer and global filter, the one that its target is
fastest at.

A cost model chooses; measured on the device, the clock does. The constants are computed here, once, in
float64. The ledger names each choice.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.fx import Node

from vmkd_fx.passes.mixing import operators  # noqa: F401  (registers the two)
from vmkd_fx.passes.mixing.choose import Choice, candidates, choose
from vmkd_fx.passes.mixing.kernels import filter_kernel
from vmkd_fx.passes.mixing.measure import measure
from vmkd_fx.passes.mixing.problem import Problem, Realisation
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite, is_call

OPERATORS = (torch.ops.vmkd.circulant, torch.ops.vmkd.global_filter)


def circulants(autotune: bool = False) -> LoweringPass:
    """The pass; `autotune` measures candidates on this machine, each shape once."""

    def realise(rewrite: Rewrite) -> None:
        for node in rewrite.calls(*OPERATORS):
            weight = rewrite.constant(node.args[1])
            if weight is None:
                rewrite.refuse(node, "its weights are computed")
                continue
            kernel, problem = _problem(rewrite, node, weight)
            realisation, choice = _chosen(problem, rewrite.target.kind, autotune)
            if rewrite.take(node, f"as {choice.name}, {_by(choice)}"):
                _write(rewrite, node, realisation, kernel)

    return LoweringPass("circulant", realise)


CIRCULANT = circulants()


def _problem(rewrite: Rewrite, node: Node, weight: Tensor) -> tuple[Tensor, Problem]:
    source = node.args[0]
    assert isinstance(source, Node)
    _, *grid, channels = rewrite.shape(source)
    kernel = weight if is_call(node, OPERATORS[0]) else filter_kernel(weight, grid[1])
    return kernel, Problem(tuple(grid), channels, kernel.shape[0])


@lru_cache(maxsize=256)
def _chosen(problem: Problem, kind: str, autotune: bool) -> tuple[Realisation, Choice]:
    if not autotune:
        return choose(problem, kind)
    return choose(problem, kind, measured=measure(problem, kind, candidates(problem, kind)))


def _by(choice: Choice) -> str:
    seconds = next(iter(choice.seconds.values()), 0.0)
    return f"{1e3 * seconds:.2g} ms " + ("measured" if choice.by == "measured" else "by the cost model")


def _write(rewrite: Rewrite, node: Node, realisation: Realisation, kernel: Tensor) -> None:
    constants = [rewrite.put(constant) for constant in realisation.prepare(kernel)]
    rewrite.replace(node, rewrite.inline(realisation.apply, node.args[0], *constants))  # type: ignore[arg-type]
