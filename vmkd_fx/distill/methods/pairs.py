"""Which block of the teacher belongs to which of the student, and how their locations are brought
together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vmkd_fx.errors import MatchError
from vmkd_fx.graph.parts import Anatomy, Block


@dataclass(frozen=True)
class Wanted:
    """A feature to read in a teacher: it arrives as patch tokens (B, N, C) on the student's grid.

    Attributes:
        place: see `vmkd_fx.graph.places`.
        layout, prefix_tokens: of the feature in the teacher.
        grid, student_grid: (height, width) of the patches; where they differ, the feature is resized.
    """

    place: int | str
    layout: str
    prefix_tokens: int
    grid: tuple[int, int] = (0, 0)
    student_grid: tuple[int, int] = (0, 0)


def grid_of(tokens: int, input_size: tuple[int, int, int], what: str) -> tuple[int, int]:
    """The (height, width) of so many patches, in the proportion of the images.

    Raises:
        MatchError: they fill no such grid.
    """
    _, image_height, image_width = input_size
    height = round(math.sqrt(tokens * image_height / image_width))
    width = tokens // height if height else 0
    if height * width != tokens or abs(height * image_width - width * image_height) > max(input_size[1:]):
        raise MatchError(
            f"{what} leaves {tokens} patch tokens, which fill no grid of the proportion of the images, "
            f"{image_height} x {image_width}"
        )
    return height, width


def spread(known: Anatomy, count: int) -> tuple[int, ...]:
    """Indices of so many blocks, spread over the stages: each stage ends with one, longer stages have more.

    Raises:
        MatchError: the model has fewer blocks.
    """
    sizes = [stage.last - stage.first + 1 for stage in known.stages]
    if not 0 < count <= sum(sizes):
        raise MatchError(f"{known.model} has {sum(sizes)} blocks in its stages, and {count} were asked for")
    if count < len(sizes):
        ends = [stage.last for stage in known.stages]
        return tuple(ends[math.ceil((i + 1) * len(ends) / count) - 1] for i in range(count))
    shares = [1] * len(sizes)
    while sum(shares) < count:
        room = [size / share if share < size else 0 for size, share in zip(sizes, shares, strict=True)]
        shares[room.index(max(room))] += 1
    return tuple(
        stage.first + math.ceil((i + 1) * size / share) - 1
        for stage, size, share in zip(known.stages, sizes, shares, strict=True)
        for i in range(share)
    )


def partner(student: Anatomy, index: int, teacher: Anatomy) -> int:
    """The teacher's block at the same share of the same stage, or of the depth where their stages differ in
    number.
    """
    if len(student.stages) != len(teacher.stages):
        share = (index + 1) / len(student.blocks)
        return max(math.ceil(share * len(teacher.blocks) - 1e-9), 1) - 1
    place = next(i for i, stage in enumerate(student.stages) if stage.first <= index <= stage.last)
    ours, theirs = student.stages[place], teacher.stages[place]
    share = (index - ours.first + 1) / (ours.last - ours.first + 1)
    return theirs.first + max(math.ceil(share * (theirs.last - theirs.first + 1) - 1e-9), 1) - 1


def same_locations(student: Block, teacher: Block, model: str, why: str) -> None:
    """Refuse a pair of blocks with different numbers of patches.

    Raises:
        MatchError: says how many each has.
    """
    if student.tokens != teacher.tokens:
        raise MatchError(
            f"{why} compares location by location, and {student.path} leaves {student.tokens} patches while "
            f"the teacher's {teacher.path} of {model} leaves {teacher.tokens}; take a teacher with the "
            "student's grids"
        )
