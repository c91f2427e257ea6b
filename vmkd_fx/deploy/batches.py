"""Which optimisation profile runs a batch, and how batches of any size are cut for the profiles there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmkd_fx.target import Profile


def cut(images: int, profiles: Sequence[Profile]) -> Iterator[tuple[int, int, int]]:
    """Cut `images` images into batches: where each starts, how many images it has, how many it is run with.

    As many as the largest profile takes at a time, then the rest. It is run with more than it has only where
    no profile takes that few; what is too much is filled up and thrown away.
    """
    most = max(profile.largest for profile in profiles)
    for start in range(0, images, most):
        count = min(most, images - start)
        yield start, count, max(count, profiles[fitting(count, profiles)].smallest)


def fitting(batch: int, profiles: Sequence[Profile]) -> int:
    """The index of the profile for `batch` images, at most as many as the largest one takes.

    Of those that take that many, the one whose best size is nearest; else the one that starts soonest above.
    """

    def unfit(index: int) -> tuple[int, int]:
        profile = profiles[index]
        return max(0, profile.smallest - batch), abs(profile.best - batch)

    large_enough = [index for index, profile in enumerate(profiles) if profile.largest >= batch]
    return min(large_enough, key=unfit)
