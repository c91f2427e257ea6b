"""The table of rules is data: what it names exists, once, and the documentation shows all of it."""

from __future__ import annotations

from pathlib import Path

import torch

import vmkd_fx
import vmkd_fx.passes.lowering  # registers this package's own operators
from vmkd_fx.deploy.precision.rules import NO_RULE, RULES, operator_name, rule_of

DOCUMENTATION = Path(vmkd_fx.__file__).parents[1] / "docs" / "precision.md"


def test_every_operator_has_one_rule_and_exists() -> None:
    named = [operator for rule in RULES for operator in rule.operators]
    assert len(named) == len(set(named)) > 100
    aten = [name for name in named if name != "getitem" and "::" not in name]
    assert [name for name in aten if not hasattr(torch.ops.aten, name)] == []
    own = [name.partition("::") for name in named if "::" in name]
    assert own and all(hasattr(getattr(torch.ops, library), name) for library, _, name in own)


def test_the_documentation_shows_the_table() -> None:
    text = DOCUMENTATION.read_text()
    for rule in RULES:
        assert rule.reason in text
        for operator in rule.operators:
            assert f"`{operator}`" in text, f"docs/precision.md does not name {operator}"


def test_what_no_rule_names_stays_float32() -> None:
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.linalg_det.default, (graph.placeholder("x"),))
    assert operator_name(node) == "linalg_det" and rule_of(node) is NO_RULE
    norm = graph.call_function(torch.ops.aten.layer_norm.default, (node, [4]))
    assert rule_of(norm).reason.startswith("a norm")
