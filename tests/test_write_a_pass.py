"""The code in docs/write-a-pass.md runs as it stands, and says what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmkd_fx.passes.rewrite import Rewrite

PAGE = Path(__file__).parents[1] / "docs" / "write-a-pass.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_page_is_one_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == 5
    exec(compile("\n".join(BLOCKS), str(PAGE), "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    assert "1 a pool before its relu" in printed
    assert "pass tanh_gelu on vit_tiny_patch16_224, at gelu: differs from the graph before by " in printed
    assert "the first bad pass on vit_tiny_patch16_224 is tanh_gelu" in printed


def test_the_pass_has_at_most_forty_lines() -> None:
    assert len(BLOCKS[0].splitlines()) <= 40


def test_the_page_names_verbs_that_are_there() -> None:
    verbs = set(re.findall(r"`rewrite\.(\w+)", PAGE.read_text(encoding="utf-8")))
    assert {"calls", "constant", "inline", "put", "replace", "take"} < verbs
    assert {verb for verb in verbs - {"target"} if not callable(getattr(Rewrite, verb, None))} == set()
