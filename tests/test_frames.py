from __future__ import annotations

import pytest

from vmkd_fx.errors import ModelError, UnknownNameError
from vmkd_fx.frames import LAYOUTS, Frames, parse_frames


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_round_trips(layout: str) -> None:
    assert parse_frames(str(Frames(layout))) == Frames(layout)


def test_bytes_lie_as_cameras_have_them_unless_told() -> None:
    assert parse_frames(" UINT8 ") == Frames("nhwc")
    own = Frames("nchw", (0.5,), (0.25,))
    assert parse_frames(own) is own


@pytest.mark.parametrize(
    ("text", "known"),
    [("float32", "uint8"), ("uint8:nhcw", "nchw, nhwc"), ("uint8:", "nchw, nhwc"), ("nhwc", "uint8")],
)
def test_another_spelling_lists_the_known_ones(text: str, known: str) -> None:
    with pytest.raises(UnknownNameError, match=f"frames '{text}'.* there is no") as caught:
        parse_frames(text)
    assert known in str(caught.value) or all(f"{name!r}" in str(caught.value) for name in known.split(", "))


@pytest.mark.parametrize(
    ("mean", "std", "what"),
    [
        ((0.5, float("nan")), None, "mean must be finite"),
        ((True,), None, "mean must be finite"),
        ((), None, "mean must be finite"),
        (None, (0.2, 0.0), "std must be finite and positive"),
        (None, ("0.2",), "std must be finite and positive"),
    ],
)
def test_mean_and_std_are_rows_of_numbers(mean: tuple, std: tuple, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        Frames("nhwc", mean, std)


def test_the_shape_of_a_frame() -> None:
    assert Frames("nhwc").shape((3, 32, 48)) == (32, 48, 3)
    assert Frames("nchw").shape((3, 32, 48)) == (3, 32, 48)
