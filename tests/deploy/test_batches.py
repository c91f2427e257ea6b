from __future__ import annotations

import pytest

from vmkd_fx.deploy.batches import cut, fitting
from vmkd_fx.target import Profile

ONE = (Profile(1, 8, 32),)
TWO = (Profile(1, 1, 1), Profile(8, 16, 32))


@pytest.mark.parametrize(
    ("profiles", "images", "expected"),
    [
        (ONE, 1, [(0, 1, 1)]),
        (ONE, 32, [(0, 32, 32)]),
        (ONE, 70, [(0, 32, 32), (32, 32, 32), (64, 6, 6)]),
        (TWO, 1, [(0, 1, 1)]),
        (TWO, 3, [(0, 3, 8)]),
        (TWO, 33, [(0, 32, 32), (32, 1, 1)]),
        ((Profile(4, 4, 4),), 6, [(0, 4, 4), (4, 2, 4)]),
        ((Profile(8, 16, 32), Profile(1, 1, 2)), 35, [(0, 32, 32), (32, 3, 8)]),
    ],
)
def test_any_number_of_images(
    profiles: tuple[Profile, ...], images: int, expected: list[tuple[int, ...]]
) -> None:
    assert list(cut(images, profiles)) == expected


def test_every_image_is_run_once_by_a_profile_that_takes_the_batch() -> None:
    profiles = (Profile(2, 3, 5), Profile(9, 9, 9), Profile(7, 20, 20))
    for images in range(1, 70):
        done = 0
        for start, count, size in cut(images, profiles):
            assert start == done and 1 <= count <= size
            profile = profiles[fitting(size, profiles)]
            assert profile.smallest <= size <= profile.largest
            done += count
        assert done == images


def test_the_profile_that_is_best_nearby() -> None:
    profiles = (Profile(1, 2, 32), Profile(1, 16, 32))
    assert [fitting(batch, profiles) for batch in (1, 8, 10, 32)] == [0, 0, 1, 1]
