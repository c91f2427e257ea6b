"""Every golden file is reproduced, and a file with one other value is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.golden.__main__ import main
from tests.golden.case import load_case
from tests.golden.replay import adapters, replay, tolerance

DATA = Path(__file__).parents[1] / "data" / "golden"
FILES = sorted(DATA.glob("*.npz"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_golden_file_is_reproduced(file: Path) -> None:
    case = load_case(file)
    errors = replay(case)
    assert errors
    assert {name: error for name, error in errors.items() if not error <= tolerance(case, name)} == {}


def test_every_adapter_has_a_file() -> None:
    assert {load_case(file).name for file in FILES} == set(adapters())


@pytest.mark.parametrize("kind", ["result", "given"])
def test_a_file_with_one_other_value_fails(kind: str, tmp_path: Path) -> None:
    source = DATA / "10_ccs_a.npz"
    with np.load(source) as file:
        arrays = {name: file[name].copy() for name in file.files}
    arrays["out/y" if kind == "result" else "in/w"].flat[3] *= -1
    changed = tmp_path / source.name
    np.savez(changed, **arrays)
    shutil.copy(source.with_suffix(".json"), tmp_path)
    assert main([str(source)]) == 0
    assert main([str(source), str(changed)]) == 1
