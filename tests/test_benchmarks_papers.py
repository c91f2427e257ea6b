"""`benchmarks/papers.py` as `make papers` runs it, with a handful of steps."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = "before\n<!-- digits: begin -->\nold\n<!-- digits: end -->\nafter\n"
COMMON = ("--seeds", "1", "--workers", "0", "--steps", "4", "--teacher-steps", "33")


@pytest.fixture
def papers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; Python puts a script's own folder first in the search path."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("papers")


@pytest.mark.slow
def test_it_trains_prints_and_writes_and_goes_on_where_it_was(
    papers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_text(PAGE)
    given = [*COMMON, "--methods", "hard", "--cache", str(tmp_path), "--out", str(page)]
    assert papers.main(given) == 0
    printed, lines = capsys.readouterr().out, results.read_text()
    done = [json.loads(line) for line in lines.splitlines()]
    assert [line["about"].split(", ")[-2:] for line in done] == [
        ["resnet"],
        ["alone", "seed 0"],
        ["kd", "seed 0"],
        ["hard", "seed 0"],
    ]
    accuracy = f"{100 * done[-1]['scores']['class']:.2f}"
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert f"| hard | resnet | {accuracy} |" in written
    assert accuracy in printed

    results.write_text(lines + '{"half a line')
    assert papers.main(given) == 0
    assert capsys.readouterr().out == printed
    assert results.read_text() == lines
    assert page.read_text() == written


def test_what_cannot_be_is_said_before_anything_is_trained(
    papers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert papers.main([*COMMON, "--methods", "hrad", "--cache", str(tmp_path)]) == 1
    assert "no method 'hrad'; did you mean 'hard'" in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("no place here\n")
    assert papers.main([*COMMON, "--out", str(page), "--cache", str(tmp_path)]) == 1
    assert "needs one line '<!-- digits: begin -->'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [page]


def test_peak_memory_is_what_tensors_hold_at_once(papers: ModuleType) -> None:
    meter = import_module("distillation_cost").PeakBytes()
    before = meter.count(torch.zeros(100))
    with meter:
        first = before + 1
        view = first[:50]
        del first
        assert (meter.now, meter.peak) == (800, 800)
        del view
        second = torch.zeros(50)
        assert (meter.now, meter.peak) == (600, 800)
        third = second.repeat(4)
    assert meter.peak == 1400
    del before, second, third
    assert meter.now == 0
