"""The sweep over timm's models: one model a family on the meta device, and the tables."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.zoo import DIVERSE, MEMBERS, Member, build, by_family
from vmkd_fx.errors import UnknownNameError
from vmkd_fx.graph.modes import ModeSwitch
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.zoo import check as check_module
from vmkd_fx.zoo import side_by_side as side_by_side_module
from vmkd_fx.zoo.agreement import disagreement
from vmkd_fx.zoo.check import check, difference, open_share
from vmkd_fx.zoo.coverage import as_csv, as_markdown
from vmkd_fx.zoo.numbers import check_numbers
from vmkd_fx.zoo.row import Row
from vmkd_fx.zoo.sweep import sweep


@pytest.mark.parametrize("member", by_family(DIVERSE))
def test_a_family_is_traced_understood_and_given_back(member: Member) -> None:
    row = check(member.name)
    assert row.faults == {}
    assert row.open_share == 1.0 or row.closed
    assert row.blocks > 0
    assert set(row.round_trip) >= {"std", "taps"}
    assert {name for name, why in row.methods.items() if not why} >= {"std", "kd", "hard", "dkd", "nkd"}


@pytest.mark.parametrize("member", by_family(("resnet", "mambaout")))
def test_a_family_on_real_numbers(member: Member) -> None:
    edge = member.size if member.built else max(member.size, 64)
    found = check_numbers(build(member), (3, edge, edge), only=("taps", "mixing", "round trip"))
    assert {name: why for name, why in found.items() if why} == {}


def test_every_family_has_a_member() -> None:
    modules = {timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    families = {name.rpartition(".")[2] for name in modules if name.startswith("timm.")}
    assert {member.family for member in MEMBERS} == families


def test_a_closed_layer_costs_open_share() -> None:
    from vmkd_fx.graph.trace import trace
    from vmkd_fx.graph.tracer import GraphTracer

    model = timm.create_model("test_resnet")
    assert open_share(trace(model)) == 1.0
    closed = TracedModule(model, GraphTracer(["layer4.0"]).trace(model))
    assert open_share(closed) < 0.9


def test_a_graph_that_is_not_given_back_is_seen() -> None:
    from vmkd_fx.graph.trace import trace
    from vmkd_fx.passes.feature_taps import tap

    module = trace(timm.create_model("test_resnet"))
    assert difference(module, module) == ""
    assert difference(tap(module, [-1]), module) == "the code of the graph differs"
    assert difference(trace(module, copy=True), module) == "other parameters"


def test_a_disagreement_with_timm_is_seen() -> None:
    from vmkd_fx.graph.anatomy import read_anatomy
    from vmkd_fx.graph.shapes import node_shapes
    from vmkd_fx.graph.trace import trace

    with torch.device("meta"):
        model = timm.create_model("test_vit")
    module = trace(model)
    shapes = node_shapes(module)
    known = read_anatomy(module, shapes)
    assert disagreement(model, module, shapes, known) == ""
    fewer = replace(known, blocks=known.blocks[:-1])
    assert disagreement(model, module, shapes, fewer) == "timm lists 6 blocks, the anatomy 5"
    model.feature_info[0]["num_chs"] = 65
    assert "has 65 channels" in disagreement(model, module, shapes, known)


def test_a_wrong_graph_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace that freezes training mode is what the check is for."""
    from vmkd_fx.zoo import numbers

    original = numbers.trace

    def frozen(model: Any, **options: Any) -> TracedModule:
        module = original(model, **options)
        for part in module.modules():
            if isinstance(part, ModeSwitch):
                part.in_evaluation = part.in_training
        return module

    monkeypatch.setattr(numbers, "trace", frozen)
    model = timm.create_model("test_vit", attn_drop_rate=0.5, img_size=32)
    nn.init.normal_(model.head.weight)
    assert "logits differs" in check_numbers(model, only=["evaluation"])["evaluation"]


def test_a_model_that_cannot_be_made_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(f"no weights for {name}")

    monkeypatch.setattr(check_module.timm, "create_model", fail)
    assert check("test_vit").faults == {
        "trace": "timm cannot create it: RuntimeError: no weights for test_vit",
        "timm": "not reached",
    }


def test_the_sweep_writes_tables_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sweep("test_re*", tmp_path, jobs=1)
    names = [row.model for row in rows]
    assert names == ["test_resnet"] or "test_resnet" in names
    journal = tmp_path / "rows.jsonl"
    before = journal.read_text()
    journal.write_text(before + '{"stamp": "cut o')

    def refuse(*_: Any) -> None:
        raise AssertionError("these models were checked before")

    monkeypatch.setattr(side_by_side_module, "_in_processes", refuse)
    assert [row.to_json() for row in sweep("test_re*", tmp_path)] == [row.to_json() for row in rows]
    assert json.loads((tmp_path / "coverage.json").read_text())[0]["model"] == names[0]
    with (tmp_path / "coverage.csv").open() as file:
        assert [line["model"] for line in csv.DictReader(file)] == names
    assert f"| models | {len(names)} |" in (tmp_path / "coverage.md").read_text()


def test_a_process_that_dies_takes_one_model_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures.process import BrokenProcessPool

    def run(_: Any, names: list[str], jobs: int) -> Any:
        for name in names:
            if name == "bad":
                raise BrokenProcessPool
            yield Row(name, "", trace="")

    def died(name: str) -> Row:
        return Row(name, "", trace="the process that checked it died")

    monkeypatch.setattr(side_by_side_module, "_in_processes", run)
    found = side_by_side_module.side_by_side(check, died, ["a", "bad", "b", "c"], 0, 2)
    rows = {row.model: row.trace for row in found}
    assert rows == {"a": "", "bad": "the process that checked it died", "b": "", "c": ""}


def test_a_pattern_that_fits_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no timm model that fits 'restnet'"):
        sweep("restnet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tables_name_every_exception() -> None:
    rows = [
        Row("one", "f", trace="", open_share=1.0, timm="", methods={"std": ""}, round_trip={"std": ""}),
        Row("two", "f", trace="", open_share=0.5, timm="unknown", methods={"std": "no blocks"}),
        Row("three", "g", trace="cannot", closed=[("a", "decides by data")]),
    ]
    text = as_markdown(rows, "timm 1, torch 2, vmkd-fx 3")
    for line in (
        "| traced and run in both modes | 2 of 3 |",
        "| method std applies | 1 of 3 |",
        "- `two`, open share: 50.0 % of the layers' parameters are open nodes",
        "- `three`, trace: cannot",
        "- g: decides by data",
    ):
        assert line in text
    assert as_csv(rows).count("\n") == 4
