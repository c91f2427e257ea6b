"""What trainings leave in their folders, for tests to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WEIGHTS = ("last.safetensors", "last_ema.safetensors", "best.safetensors")


def lines(out: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The whole lines of the log; the last may still be on its way."""
    text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in found if event in (None, line["event"])]


def determined(out: Path) -> list[dict[str, Any]]:
    """The lines of the log that depend on nothing but the recipe: no clock, no interruption."""
    return [line for line in lines(out) if line["event"] not in ("resumed", "pace")]
