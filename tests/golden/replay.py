"""Replay a case and hold every recorded result against what the project computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

import torch
from torch import Tensor

from tests.golden.case import Case

Adapter = Callable[[Case], Mapping[str, Tensor]]

TOLERANCE = 1e-9
"""Of a result's largest magnitude; everything is computed in float64."""

SINGLE = 1e-6
"""The same for a result that was computed in single precision: another processor rounds otherwise."""

ZERO = 1e-12
"""A result that is zero but for rounding is compared absolutely."""

MODULES = ("losses", "ccs", "cit", "std", "networks_gfnet_riformer", "networks_rednet_cyclemlp")


def adapters() -> dict[str, Adapter]:
    """The adapter of each kind of case."""
    found: dict[str, Adapter] = {}
    for name in MODULES:
        cases = import_module(f"tests.golden.{name}").CASES
        if twice := found.keys() & cases.keys():
            raise ValueError(f"two adapters for {', '.join(sorted(twice))}")
        found.update(cases)
    return found


def tolerance(case: Case, name: str) -> float:
    """The largest error that a result may have."""
    return SINGLE if name in case.single else TOLERANCE


def replay(case: Case) -> dict[str, float]:
    """The relative error of each recorded result, in the order of the file; infinite where it cannot be
    compared.
    """
    known = adapters()
    if case.name not in known:
        raise KeyError(f"no adapter for the case {case.name!r}; there are {', '.join(sorted(known))}")
    found = known[case.name](case)
    if extra := found.keys() - case.results.keys():
        raise KeyError(f"{case.name}: the file has no {', '.join(sorted(extra))}")
    return {name: _error(found.get(name), value) for name, value in case.results.items()}


def _error(found: Tensor | None, recorded: Tensor) -> float:
    if found is None or found.shape != recorded.shape:
        return float("inf")
    recorded, found = recorded.double(), found.detach().double()
    if not recorded.numel():
        return 0.0
    largest = float(recorded.abs().max())
    error = float((found - recorded).abs().max()) / (largest if largest > ZERO else 1.0)
    return error if torch.isfinite(torch.tensor(error)) else float("inf")
