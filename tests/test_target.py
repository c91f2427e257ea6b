from __future__ import annotations

import pytest

from vmkd_fx.errors import BuildError, UnknownNameError
from vmkd_fx.target import COMPUTE_CAPABILITIES, KINDS, Profile, Target, parse_target


@pytest.mark.parametrize("text", [*KINDS, "tensorrt-rtx:sm86", "tensorrt-rtx:sm86,sm89,sm120"])
def test_text_round_trips(text: str) -> None:
    assert str(parse_target(text)) == text


def test_compute_capabilities_are_sorted_and_unique() -> None:
    assert parse_target(" TensorRT-RTX:sm120, sm86,sm86 ") == Target("tensorrt-rtx", (86, 120))


def test_unknown_kind_lists_near_and_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"'tensort-rtx'; did you mean 'tensorrt-rtx'.*onnxruntime"):
        parse_target("tensort-rtx:sm86")


@pytest.mark.parametrize("text", ["sm90", "86", "", "sm86,"])
def test_unknown_compute_capability_lists_the_known_ones(text: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        parse_target(f"tensorrt-rtx:{text}")
    assert all(f"sm{sm}" in str(caught.value) for sm in COMPUTE_CAPABILITIES)


@pytest.mark.parametrize("kind", ["torch", "onnxruntime", "tensorrt"])
def test_kinds_without_compute_capabilities_refuse_a_list(kind: str) -> None:
    with pytest.raises(BuildError, match=f"{kind} takes no list of compute capabilities"):
        parse_target(f"{kind}:sm86")


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 4), (1, 8, 4), (1, 2.0, 4), (True, 2, 4)])
def test_profile_refuses_what_is_no_range_of_batches(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(BuildError, match="optimisation profile"):
        Profile(*sizes)
