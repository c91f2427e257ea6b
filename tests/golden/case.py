"""A golden file: `X.npz` with arrays, `X.json` with what they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GIVEN = ("in/", "sd/")
"""How the names of what a case starts from begin; everything else is a result."""


@dataclass(frozen=True)
class Case:
    """One recorded run.

    Attributes:
        name: of the kind of case, "02_nkd" say, which chooses the adapter.
        config: sizes and settings.
        arrays: by name; real numbers are float64, integers int64.
        meta: the whole JSON file.
        single: names of the arrays that were recorded in single precision.
    """

    name: str
    config: dict[str, Any]
    arrays: dict[str, Tensor]
    meta: dict[str, Any]
    single: frozenset[str] = frozenset()

    @property
    def results(self) -> dict[str, Tensor]:
        """What was recorded as computed."""
        return {name: value for name, value in self.arrays.items() if not name.startswith(GIVEN)}

    def state(self, prefix: str = "sd/") -> dict[str, Tensor]:
        """The weights under `prefix`, by the authors' keys."""
        return {name[len(prefix) :]: v for name, v in self.arrays.items() if name.startswith(prefix)}


def load_case(path: str | Path) -> Case:
    """Read `X.npz` and `X.json` beside it; arrays are data, nothing in them is run."""
    path = Path(path)
    meta = json.loads(path.with_suffix(".json").read_text())
    with np.load(path, allow_pickle=False) as file:
        raw = {name: file[name] for name in file.files}
    single = frozenset(name for name, array in raw.items() if array.dtype == np.float32)
    arrays = {name: _tensor(array) for name, array in raw.items()}
    return Case(meta["case"], meta["config"], arrays, meta, single)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    kind = np.float64 if array.dtype.kind == "f" else bool if array.dtype.kind == "b" else np.int64
    return torch.from_numpy(np.array(array, dtype=kind))
