"""Plain JSON values to frozen dataclasses, every value checked for its type on the way.

The dataclass is the schema: all of its fields must be there, nothing else may be, and each must hold what its
annotation says. Ranges are for the dataclass's own `__post_init__` to check.
"""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from vmkd_fx.errors import DataError

T = TypeVar("T")
_Decoder = Callable[[Any, str], Any]

# What would move a terminal's cursor or cannot be written as UTF-8 has no place in a name or a label.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_LARGEST_INT = 2**63


def decode(kind: type[T], data: Any, where: str) -> T:
    """`data`, as `json.loads` gives it, as an instance of the dataclass `kind`.

    Fields may be str, int, float, bool, dataclasses, `X | None`, tuples and dicts of these with str keys.

    Args:
        where: what `data` is, to begin each message with.

    Raises:
        DataError: a value is missing, unknown or of another type; it says where.
    """
    schema: Any = kind
    decoded: T = _decoder(schema)(data, where)
    return decoded


@functools.cache
def _decoder(kind: Any) -> _Decoder:
    if kind in _PLAIN:
        return _PLAIN[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (_decoder(argument) for argument in arguments if argument is not types.NoneType)
        return lambda data, where: None if data is None else inner(data, where)
    if origin is tuple:
        return _tuple(arguments)
    if origin is dict:
        return _dict(_decoder(arguments[1]))
    if is_dataclass(kind):
        return _dataclass(kind)
    raise TypeError(f"{kind} cannot be decoded")


def _dataclass(kind: Any) -> _Decoder:
    hints = typing.get_type_hints(kind)
    parts = {field.name: _decoder(hints[field.name]) for field in fields(kind)}

    def decode_fields(data: Any, where: str) -> Any:
        if type(data) is not dict:
            raise _wrong(where, "an object", data)
        if data.keys() != parts.keys():
            missing, unknown = sorted(parts.keys() - data.keys()), sorted(data.keys() - parts.keys())
            found = [f"{name!r} is missing" for name in missing] + [
                f"{name!r} is unknown" for name in unknown
            ]
            raise DataError(f"{where}: {', '.join(found)}")
        return kind(**{name: part(data[name], f"{where}.{name}") for name, part in parts.items()})

    return decode_fields


def _tuple(arguments: tuple[Any, ...]) -> _Decoder:
    part = _decoder(arguments[0])
    length = None if arguments[-1] is Ellipsis else len(arguments)

    def decode_items(data: Any, where: str) -> Any:
        if type(data) is not list or (length is not None and len(data) != length):
            raise _wrong(where, "a list" if length is None else f"a list of {length}", data)
        return tuple([part(item, f"{where}[{index}]") for index, item in enumerate(data)])

    return decode_items


def _dict(part: _Decoder) -> _Decoder:
    def decode_values(data: Any, where: str) -> Any:
        if type(data) is not dict:
            raise _wrong(where, "an object", data)
        return {_text(key, f"a key of {where}"): part(data[key], f"{where}[{key!r}]") for key in data}

    return decode_values


def _text(data: Any, where: str) -> str:
    if type(data) is not str:
        raise _wrong(where, "a string", data)
    if _UNPRINTABLE.search(data):
        raise DataError(f"{where} holds a character that cannot be printed: {data[:80]!a}")
    return data


def _whole(data: Any, where: str) -> int:
    if type(data) is not int or abs(data) >= _LARGEST_INT:
        raise _wrong(where, "a whole number below 2**63", data)
    return data


def _number(data: Any, where: str) -> float:
    if type(data) not in (int, float) or not abs(data) < math.inf or abs(data) > 1e308:
        raise _wrong(where, "a finite number", data)
    return float(data)


def _truth(data: Any, where: str) -> bool:
    if type(data) is not bool:
        raise _wrong(where, "true or false", data)
    return data


def _wrong(where: str, expected: str, found: Any) -> DataError:
    shown = ascii(found) if isinstance(found, str | int | float | None) else type(found).__name__
    return DataError(f"{where} must be {expected}, found {shown[:80]}")


_PLAIN: dict[Any, _Decoder] = {str: _text, int: _whole, float: _number, bool: _truth}
