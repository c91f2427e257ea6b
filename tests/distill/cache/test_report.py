"""What is said about a cache that has been written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distill.cache.recipes import recipe
from vmkd_fx.distill.cache.folder import CacheFolder, Manifest
from vmkd_fx.distill.cache.form import Form
from vmkd_fx.distill.cache.report import advice

HOT = {"preset": "cit", "temperatures": [1.0, 3.0]}


@pytest.mark.parametrize(
    ("methods", "top_k", "said"),
    [
        (["kd"], 3, "kd softens at temperature 3.0"),
        (["nkd", HOT], 3, "cit softens at temperature 3.0"),
        (["nkd", "cit"], 3, None),
        (["kd"], None, None),
    ],
)
def test_a_top_k_that_is_softened_is_named(
    tmp_path: Path, methods: list[Any], top_k: int | None, said: str | None
) -> None:
    manifest = Manifest({}, {}, {}, count=8, rows=8, form=Form(10, top_k))
    found = advice(CacheFolder(tmp_path, manifest), recipe(tmp_path, method=methods))
    assert found is None if said is None else found is not None and said in found
