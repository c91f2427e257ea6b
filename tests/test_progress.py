from __future__ import annotations

import pytest

from vmkd_fx import progress as module
from vmkd_fx.progress import progress


def test_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(progress("ab", "reading")) == ["a", "b"]
    assert capsys.readouterr().err.splitlines() == [
        "reading: 0/2, 0 s, started",
        "reading: 1/2, 0 s",
        "reading: 2/2, 0 s",
        "reading: 2/2, 0 s, done",
    ]


def test_quick_work_is_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(100, "training", initial=40) as bar:
        bar.note("loss 0.5")
        for _ in range(60):
            bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "training: 40/100, 0 s, started",
        "training: 100/100, 0 s, loss 0.5, done",
    ]


def test_unknown_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(progress((i for i in range(4)), "adding")) == 6
    assert capsys.readouterr().err.splitlines()[-1] == "adding: 4, 0 s, done"


def test_an_error_stops_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="inside"), progress(2, "building") as bar:
        bar.update()
        raise ValueError("inside")
    assert capsys.readouterr().err.splitlines()[-1] == "building: 1/2, 0 s, stopped"


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(3, "counting", show=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(progress(3, "counting")) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "\r" in shown and "3/3" in shown and "counting" in shown
