from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from vmkd_fx.deploy.decode import decode
from vmkd_fx.errors import DataError


@dataclass(frozen=True)
class Inner:
    words: tuple[str, ...] = ()
    pair: tuple[int, int] = (1, 2)


@dataclass(frozen=True)
class Outer:
    number: float
    flag: bool
    inner: Inner | None = None
    many: dict[str, Inner] = field(default_factory=dict)


GOOD = {
    "number": 1,
    "flag": True,
    "inner": {"words": ["ä\n"], "pair": [3, 4]},
    "many": {"a": {"words": [], "pair": [5, 6]}},
}


def test_a_dataclass_is_its_own_schema() -> None:
    found = decode(Outer, GOOD, "it")
    assert found == Outer(1.0, True, Inner(("ä\n",), (3, 4)), {"a": Inner((), (5, 6))})
    assert type(found.number) is float
    assert decode(Outer, {**GOOD, "inner": None}, "it").inner is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"number": True}, "it.number must be a finite number, found True"),
        ({"number": "1"}, "it.number must be a finite number, found '1'"),
        ({"number": float("inf")}, "it.number must be a finite number"),
        ({"number": 10**309}, "it.number must be a finite number"),
        ({"flag": 1}, "it.flag must be true or false, found 1"),
        ({"inner": {"words": []}}, "it.inner: 'pair' is missing"),
        (
            {"inner": {"words": [], "pair": [1, 2], "x": 1, "y": 2}},
            "it.inner: 'x' is unknown, 'y' is unknown",
        ),
        ({"inner": {"words": [], "pair": [1, 2, 3]}}, "it.inner.pair must be a list of 2"),
        ({"inner": {"words": [], "pair": [1, 2.0]}}, r"it.inner.pair\[1\] must be a whole number"),
        ({"inner": {"words": "ab", "pair": [1, 2]}}, "it.inner.words must be a list, found 'ab'"),
        ({"inner": {"words": ["\x1b["], "pair": [1, 2]}}, r"it.inner.words\[0\] holds a character"),
        ({"inner": []}, "it.inner must be an object, found list"),
        ({"many": {"a": None}}, r"it.many\['a'\] must be an object, found None"),
        ({"many": {"\x00": None}}, "a key of it.many holds a character that cannot be printed"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode(Outer, {**GOOD, **change}, "it")


def test_what_has_no_schema_is_a_mistake_of_ours() -> None:
    @dataclass
    class Loose:
        anything: object

    with pytest.raises(TypeError, match="cannot be decoded"):
        decode(Loose, {"anything": 1}, "it")
