"""The ledger and its table."""

from __future__ import annotations

import json

from vmkd_fx.steps import Ledger, Refusal, Step
from vmkd_fx.table import in_billions, in_millions, table

STEP = Step(
    "fold",
    "two into one",
    matched=2,
    refused=tuple(Refusal(f"mul_{i}", "read twice") for i in range(5)),
    nodes=7,
    parameters=18_528_264,
    multiply_adds=3_785_488_384,
    error=3.2e-16,
    tolerance=1e-12,
    checked="float64",
)


def test_it_goes_through_json() -> None:
    ledger = Ledger((STEP,), {"class": 0.9}).add(Step("engine", checked="built, not run"))
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


def test_it_prints_every_figure_and_the_first_refusals() -> None:
    text = str(Ledger((STEP,), {"class": 0.9}))
    row = next(line for line in text.splitlines() if line.startswith("fold "))
    assert row.split("  ")[-1] == "two into one"
    for figure in ("18.528 M", "3.785 G", "3.2e-16", "float64"):
        assert figure in row
    assert text.count("left mul_") == 3
    assert "fold left 2 more sites alone" in text
    assert text.endswith("accuracy by prediction: class 90.00 %")


def test_a_table_aligns_its_columns() -> None:
    lines = table(
        ("name", "count"), [("a", 1), ("long name", 1234), ("none", None)], right=("count",)
    ).splitlines()
    assert lines[0] == "name       count"
    assert lines[2] == "a              1"
    assert lines[3] == "long name   1234"
    assert lines[4] == "none"
    assert in_millions(None) is None is in_billions(None)
