"""A JSON text that carries its own SHA-256, so that a changed byte is seen before anything is parsed.

    { "sha256": "<64 hexadecimal digits>", ... }

The digest is of the text without those digits. It says that a file arrived as it was written, not who wrote
it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from vmkd_fx.errors import DataError

_HEAD = b'{\n "sha256": "'
_DIGITS = 64


def seal(data: dict[str, Any]) -> bytes:
    """`data` as sealed JSON; equal data give equal bytes."""
    return seal_text(json.dumps({"sha256": "", **data}, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def seal_text(text: str) -> bytes:
    """JSON text that begins with an empty "sha256", sealed."""
    rest = text.encode()[len(_HEAD) :]
    return _HEAD + _digest(rest) + rest


def unseal(raw: bytes) -> dict[str, Any]:
    """What `seal` was given, as plain JSON values.

    Raises:
        DataError: the text is not sealed, was changed, or is no JSON.
    """
    found, rest = raw[len(_HEAD) : len(_HEAD) + _DIGITS], raw[len(_HEAD) + _DIGITS :]
    if not raw.startswith(_HEAD) or len(found) < _DIGITS:
        raise DataError("it does not begin with its own SHA-256, as vmkd-fx writes it")
    expected = _digest(rest)
    if found != expected:
        raise DataError(
            f"it was changed: its SHA-256 is {expected[:12].decode()}…, "
            f"it says {ascii(found[:12].decode('latin-1'))[1:-1]}…"
        )
    try:
        data: dict[str, Any] = json.loads(
            raw.decode(), parse_constant=_refuse_constant, object_pairs_hook=_each_once
        )
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is not valid JSON: {error}") from error
    del data["sha256"]
    return data


def _digest(rest: bytes) -> bytes:
    return hashlib.sha256(_HEAD + rest).hexdigest().encode()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("an object names a key twice")
    return data
