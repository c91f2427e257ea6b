"""The ledger and its table."""

from __future__ import annotations

import re
from dataclasses import replace

from vmkd_fx.steps import WIDTH, Ledger, Refusal, Step
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


def test_it_prints_every_figure_and_the_first_refusals() -> None:
    text = str(Ledger((STEP,), {"class": 0.9}))
    row = next(line for line in text.splitlines() if line.startswith("fold "))
    assert re.split(r"  +", row) == [
        *("fold", "2", "5", "7", "18.528 M", "3.785 G", "3.2e-16", "1.0e-12", "two into one"),
    ]
    assert "checked, float64: fold" in text
    assert "fold left 5 sites alone: read twice: mul_0, mul_1, mul_2, mul_3 and 1 more" in text
    assert text.endswith("accuracy by prediction: class 90.00 %")


def test_every_node_left_alone_with_its_reason() -> None:
    lines = Ledger((STEP,)).text(every=True).splitlines()
    assert [line for line in lines if "alone" in line] == [
        f"fold left mul_{i} alone: read twice" for i in range(5)
    ]


def test_reasons_that_differ_in_names_and_measured_values_alone_are_one() -> None:
    reasons = [f"conv2d_{i} before it differs by 3.{i}e-0{i + 1}" for i in range(3)]
    refused = tuple(Refusal(f"mul_{i}", reason) for i, reason in enumerate((*reasons, "another axis")))
    text = str(Ledger((replace(STEP, refused=refused),)))
    assert "fold left 3 sites alone: conv2d before it differs by *: mul_0, mul_1, mul_2" in text
    assert "fold left 1 site alone: another axis: mul_3" in text


def test_the_totals_from_the_first_graph_to_the_last() -> None:
    first = Step("training graph", "net", nodes=100, parameters=2_000_000, multiply_adds=10**9)
    last = Step("lowered", nodes=75, parameters=1_000_000, multiply_adds=10**9, error=0.0, tolerance=1e-12)
    text = str(Ledger((first, last, Step("onnx", nodes=60))))
    assert (
        "from training graph to lowered: nodes 100 -> 75 (-25.0 %), parameters 2.000 M -> 1.000 M (-50.0 %), "
        "multiply-adds 1.000 G (as before)"
    ) in " ".join(text.split())
    assert re.search(r"^lowered +75 +1.000 M +1.000 G +0 +1.0e-12$", text, re.MULTILINE)


def test_it_is_no_wider_than_it_may_be() -> None:
    wordy = replace(STEP, detail="words " * 60, checked="at length " * 30)
    long = tuple(Refusal(f"node_{i}", "for reasons " * 20) for i in range(5))
    ledger = Ledger(
        (wordy, replace(wordy, refused=long, nodes=10**6, parameters=10**10, multiply_adds=10**13))
    )
    for text in (ledger.text(), ledger.text(every=True)):
        assert max(map(len, text.splitlines())) <= WIDTH


def test_a_table_aligns_its_columns() -> None:
    lines = table(
        ("name", "count"), [("a", 1), ("long name", 1234), ("none", None)], right=("count",)
    ).splitlines()
    assert lines[0] == "name       count"
    assert lines[2] == "a              1"
    assert lines[3] == "long name   1234"
    assert lines[4] == "none"
    assert in_millions(None) is None is in_billions(None)
