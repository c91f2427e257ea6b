"""Which of many cases run each time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def rest_slow(cases: Iterable[Any], default: int = 1) -> list[Any]:
    """Cases for `parametrize`: the first `default` in each run, the others under the marker `slow`."""
    return [
        case if place < default else pytest.param(*_values(case), marks=pytest.mark.slow)
        for place, case in enumerate(cases)
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
