"""What differs between two trees of plain data, in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

_DIGEST = 2 * hashlib.sha256().digest_size
_SHOWN = 12


class _Absent:
    def __str__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def differences(found: Any, asked: Any, name: str = "") -> list[str]:
    """What differs between plain data that was found and that is asked for, as sentences with dotted keys."""
    if isinstance(found, Mapping) and isinstance(asked, Mapping):
        keys = [*found, *(key for key in asked if key not in found)]
        pairs = (
            (f"{name}.{key}".lstrip("."), found.get(key, _ABSENT), asked.get(key, _ABSENT)) for key in keys
        )
        return [change for path, one, other in pairs for change in differences(one, other, path)]
    return [] if found == asked else [f"{name} was {_short(found)} and is {_short(asked)}"]


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == _DIGEST:
        return value[:_SHOWN]
    text = json.dumps(value) if isinstance(value, (Mapping, Sequence)) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
