"""The sweep down to engines: one real member, its reasons where it stops, and the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmkd_fx.cli import main
from vmkd_fx.errors import UnknownNameError, VerificationError
from vmkd_fx.zoo import deployment, side_by_side
from vmkd_fx.zoo.deployment import Deployment, Engine, check_deployment
from vmkd_fx.zoo.deployment_table import as_markdown
from vmkd_fx.zoo.engines import sweep_engines

MEMBER = "test_resnet"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members are checked in this process: another one takes seconds to start."""

    def in_this_process(check: Callable[[str], Any], names: list[str], _: int) -> Iterator[Any]:
        return map(check, names)

    monkeypatch.setattr(side_by_side, "_in_processes", in_this_process)


@pytest.mark.engine
def test_a_member_goes_all_the_way_and_is_not_tried_again(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SM75 takes no float32: the engine for all is refused, and the one for SM86 alone is built."""
    monkeypatch.setattr(deployment, "COMPUTE_CAPABILITIES", (75, 86))
    monkeypatch.setattr(deployment, "PRECISIONS", ("fp32",))
    (row,) = sweep_engines(MEMBER, tmp_path, jobs=1)
    assert list(row.failed) == ["fp32, engine"] and "75" in row.failed["fp32, engine"]
    engine = row.engines["fp32"]
    assert engine.built == [86] and engine.size > 100_000
    assert engine.batch == "any" and engine.nodes > 20
    assert 20 < engine.fixed_layers <= engine.layers
    assert engine.difference is not None and 0 < engine.difference <= 1e-5
    assert row.operators[0] > row.operators[1] > 0
    assert row.error is not None and row.bound is not None and 0 < row.error <= row.bound

    def again(*_: Any) -> None:
        raise AssertionError("this member was tried before")

    monkeypatch.setattr(side_by_side, "_in_processes", again)
    assert main(["sweep", "--engines", "--pattern", MEMBER, "--out", str(tmp_path)]) == 0
    assert "0 of 1 models without a fault" in capsys.readouterr().out
    assert json.loads((tmp_path / "engines.json").read_text()) == [row.to_json()]
    assert Deployment.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_what_fails_is_a_reason_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise VerificationError("pass views: differs\nmore of it")

    monkeypatch.setattr(deployment, "lower", refuse)
    row = check_deployment(MEMBER)
    assert row.failed == {"lowering": "pass views: differs"} and not row.engines


@pytest.mark.engine
def test_a_member_that_kills_its_process_costs_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures.process import BrokenProcessPool

    def dies(*_: Any) -> Iterator[Any]:
        raise BrokenProcessPool

    monkeypatch.setattr(side_by_side, "_in_processes", dies)
    (row,) = sweep_engines(MEMBER, tmp_path, jobs=1)
    assert row.family == "resnet" and row.failed == {"lowering": "the process that tried it died"}


def test_names_that_are_no_member(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no member of the zoo 'resnet_fifty'"):
        check_deployment("resnet_fifty")


@pytest.mark.engine
def test_the_table_shows_every_figure_and_every_reason() -> None:
    good = Engine(50, "any", 3e-7, 1e-5, None, 136, 120, [86, 89, 120], 2_000_000)
    half = Engine(52, "any", 2e-7, 1e-5, 4e-4, 138, 138, [86, 89, 120], 1_000_000)
    fixed = Engine(60, "1", 2e-4, 5e-4, None, 70, 70, [86], 2_000_000)
    rows = [
        Deployment("vit_a", "vit", 32, {"depth": 2}, [63, 55], 1e-16, 1e-12, {"fp32": good, "fp16": half}),
        Deployment(
            "net_b", "net", 64, {}, [9, 8], 2e-11, 3e-11, {"fp32": fixed}, {"fp32, engine": "no SM89"}
        ),
        Deployment("net_c", "other", 64, failed={"lowering": "cannot follow it"}),
    ]
    text = as_markdown(rows, "timm 1, torch 2, vmkd-fx 3")
    for line in (
        "| lowered, error within the bound | 2 of 3 |",
        "| fp32: with any batch | 1 of 3 |",
        "| fp32: layers at most 1.1 times those for a batch of one | 1 of 3 |",
        "| fp32: built for SM86 | 2 of 3 |",
        "| fp32: built for SM89 | 1 of 3 |",
        "| vit | `vit_a`\\* | 32 | 63 -> 55 | 1e-16 | 1e-12 | 50 | 3e-07 | 136 | 120 | 86 89 120 "
        "| 52 | 2e-07 | 4e-04 | 138 | 138 | 86 89 120 |",
        "| net | `net_b` | 64 | 9 -> 8 | 2e-11 | 3e-11 | 60 (batch 1) | 2e-04 (of 5e-04) | 70 | 70 | 86 |",
        "| other | `net_c` | 64 | no | no | no | no | no | no | no | no |",
        "| fp16: layers at most 1.1 times those for a batch of one | 1 of 3 |",
        "- net (`net_b`), fp32, engine: no SM89",
        "- other (`net_c`), lowering: cannot follow it",
        "- vit: depth 2",
    ):
        assert line in text
