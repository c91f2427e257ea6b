"""Presets and their settings."""

from __future__ import annotations

import pytest

from vmkd_fx.distill.methods import PRESETS, resolve
from vmkd_fx.errors import RecipeError, UnknownNameError


def test_presets_go_by_their_own_name() -> None:
    assert all(resolve(name).name == name for name in PRESETS)


def test_settings_change_a_preset_and_leave_it_alone() -> None:
    assert resolve("std", {"alpha": 0.9, "positions": ["1/2"]}).positions == ("1/2",)
    assert PRESETS["std"].alpha == 0.5


def test_one_position_serves_all_teachers() -> None:
    assert resolve("std").config(3).positions == (-1, -1, -1)
    assert resolve("std-intermediate").config(2).positions == ("2/3", -1)


def test_positions_that_fit_no_count() -> None:
    with pytest.raises(RecipeError, match=r"2 positions .* for 3 teachers"):
        resolve("std-intermediate").config(3)


def test_an_unknown_preset() -> None:
    with pytest.raises(UnknownNameError, match=r"no method 'sdt'; did you mean 'std'.*Known: .*hard, kd"):
        resolve("sdt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alhpa": 0.5}, "no setting 'alhpa'; did you mean 'alpha'"),
        ({"alpha": 1.5}, "from 0 to 1, got 1.5"),
        ({"alpha": "half"}, "got 'half'"),
        ({"temperature": 0}, "above 0"),
        ({"positions": 3}, "a list with one block for each teacher"),
        ({"distillation": "warm"}, "no distillation 'warm'"),
        ({"confidence": "yes"}, "no confidence 'yes'"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises((RecipeError, UnknownNameError), match=message):
        resolve("std", settings)
