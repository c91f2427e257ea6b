"""`vmkd plot`: logs as curves and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from vmkd_fx.cli import main
from vmkd_fx.distill.curves import Run, read_runs, summary
from vmkd_fx.distill.curves_plot import binned, draw, panels_of, spread
from vmkd_fx.errors import DataError, OutputError

drawing = pytest.mark.skipif(find_spec("matplotlib") is None, reason="the extra `plot` is not installed")


def lines(epochs: int, steps: int = 10, *, average: bool = False, **terms: float) -> list[dict[str, Any]]:
    """The log of a training whose loss falls by 1 / step and whose accuracy rises, then falls a little."""
    found: list[dict[str, Any]] = []
    for step in range(1, epochs * steps + 1):
        epoch = (step - 1) // steps
        found.append({"event": "step", "step": step, "epoch": epoch, "lr": 1e-3, "loss": 1 / step, **terms})
        if step % steps == 0:
            accuracy = 0.9 - abs(epoch - 1) * 0.1
            line = {"event": "epoch", "step": step, "epoch": epoch, "loss": 0.5, "accuracy": accuracy}
            found.append({**line, "ema_accuracy": accuracy + 0.05} if average else line)
    return found


def write(folder: Path, content: Iterable[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in content)
    (folder / "log.jsonl").write_text(text + tail, encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    plain = write(tmp_path / "runs" / "plain", lines(3))
    before = {
        "event": "validation",
        "step": 0,
        "accuracy": 0.1,
        "teachers": [{"model": "big", "accuracy": 0.95}],
    }
    terms = {"class_loss": 0.5, "dist_loss": 0.2, "kd/0": 0.4}
    return [plain, write(tmp_path / "runs" / "kd", [before, *lines(4, 20, average=True, **terms)])]


def test_what_a_log_says(runs: list[Path]) -> None:
    (plain, kd), left = read_runs(runs)
    assert left == [] and (plain.name, kd.name) == ("plain", "kd")
    assert plain.logged["loss"] == [(step, 1 / step) for step in range(1, 31)]
    assert plain.steps_per_epoch == 10 and kd.steps_per_epoch == 20 and kd.steps == 80
    assert kd.scores["accuracy"][0] == (0, 0.1) and kd.scores["accuracy"][-1][0] == 80
    assert kd.teachers == {"big": 0.95} and plain.teachers == {}
    assert panels_of([plain]) == ["accuracy", "loss", "lr"]
    assert panels_of([plain, kd]) == ["accuracy", "loss", "class_loss", "dist_loss", "kd/0", "lr"]


def test_the_table_has_last_and_best_figures(runs: list[Path]) -> None:
    header, _, plain, kd = summary(read_runs(runs)[0]).splitlines()
    assert "best averaged" in header
    assert plain.split() == [
        "plain",
        "30",
        "3",
        "0.03333",
        "0.001",
        "80.00",
        "%",
        "90.00",
        "%",
        "(epoch",
        "2)",
    ]
    assert "70.00 %" in kd and "90.00 % (epoch 2)" in kd and "95.00 % (epoch 2)" in kd


@drawing
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_picture(runs: list[Path], kind: str, tmp_path: Path) -> None:
    out = tmp_path / f"curves.{kind}"
    draw(read_runs(runs)[0], out)
    starts = {"png": b"\x89PNG", "svg": b"<?xml"}
    assert out.read_bytes().startswith(starts[kind])
    if kind == "svg":
        text = out.read_text(encoding="utf-8")
        # matplotlib writes letters as shapes, and what they say as comments.
        assert {f"<!-- {word} -->" in text for word in ("kd/0", "epochs", "plain", "teacher big")} == {True}


@drawing
@pytest.mark.filterwarnings("error")
def test_a_teacher_far_below_leaves_the_picture_whole(tmp_path: Path) -> None:
    before = {
        "event": "validation",
        "step": 0,
        "accuracy": 0.1,
        "teachers": [{"model": "t", "accuracy": 0.2}],
    }
    draw(read_runs([write(tmp_path / "run", [before, *lines(3)])])[0], tmp_path / "curves.svg")
    assert "<!-- teacher t -->" not in (tmp_path / "curves.svg").read_text(encoding="utf-8")


@drawing
def test_a_training_that_runs_is_drawn_in_steps(tmp_path: Path) -> None:
    folder = write(tmp_path / "young", lines(1)[:5], tail='{"event": "step", "st')
    (run,), _ = read_runs([folder])
    assert run.steps == 5 and run.steps_per_epoch is None and "young" in summary([run])
    draw([run], tmp_path / "young.svg")
    assert "<!-- steps -->" in (tmp_path / "young.svg").read_text(encoding="utf-8")


def test_what_is_not_finite_is_left_out() -> None:
    run = Run("x", Path("x"))
    run.add({"event": "step", "step": 1, "loss": math.nan, "norm": None, "lr": 0.1})
    assert run.logged == {"lr": [(1, 0.1)]}


@drawing
def test_folders_without_a_log_are_left_out_and_nothing_else_is_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "runs" / "notes.txt"
    other.write_text("x")
    out = tmp_path / "curves.png"
    assert main(["plot", *map(str, [*runs, other, runs[0]]), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert out.exists() and str(other) in said.err and said.out.count("plain") == 1
    with pytest.raises(DataError, match=r"no log of a training in .*notes.txt"):
        read_runs([other])


@pytest.mark.parametrize("bad", ["[]\n", "{}\n", "no json\n"])
def test_a_damaged_log_is_named_with_its_line(tmp_path: Path, bad: str) -> None:
    folder = write(tmp_path / "bad", lines(1), tail=bad)
    with pytest.raises(DataError, match=r"log\.jsonl:12 is no line"):
        read_runs([folder])


def test_an_empty_log_and_another_kind_of_picture(tmp_path: Path, runs: list[Path]) -> None:
    with pytest.raises(DataError, match="no steps yet"):
        read_runs([write(tmp_path / "new", [])])
    with pytest.raises(OutputError, match=r"ends in \.png"):
        draw(read_runs(runs)[0], tmp_path / "curves.gif")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write(tmp_path / parent / "std", lines(1)) for parent in ("a", "b")]
    assert [run.name for run in read_runs(folders)[0]] == ["a/std", "b/std"]


def test_binned() -> None:
    points = [(float(step), float(step % 2)) for step in range(10)]
    steps, means, least, largest = binned(points, bins=5)
    assert steps == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert (means, least, largest) == ([0.5] * 5, [0.0] * 5, [1.0] * 5)
    assert binned(points, bins=100)[1] == [value for _, value in points]


def test_labels_are_moved_apart_and_no_further() -> None:
    assert spread([0.1, 0.9], 0.2) == [0.1, 0.9]
    assert spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    placed = spread([0.52, 0.5, 0.51, 0.9], 0.1)
    assert placed == pytest.approx([0.61, 0.41, 0.51, 0.9])
