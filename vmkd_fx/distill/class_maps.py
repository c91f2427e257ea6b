"""Class maps: which of a teacher's classes each class of the student is.

A teacher of ImageNet-21k teaches a student of ImageNet-1k: of its logits those of the student's classes are
kept, in the student's order, so the softmax of whatever loss reads them is over the kept ones alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vmkd_fx.errors import ModelError, RecipeError

UNKNOWN = -1
"""In a map: the teacher does not know this class."""

LABELS = "labels"
"""Instead of a file: the student's classes are named by WordNet identifiers."""

_SYNSET = re.compile(r"n\d{8}")


def read_class_map(
    given: str | Sequence[int], known: int, labels: Sequence[str] = (), teacher: str = "the teacher"
) -> tuple[int, ...]:
    """The teacher's class of each class of the student, `UNKNOWN` where it has none.

    Args:
        given: the numbers themselves; or a file with one line a class of the student, a number or a WordNet
            identifier (n01440764), where what follows a # is left out; or "labels", where `labels` are such
            identifiers, as the folders of ImageNet are.
        known: how many classes the teacher knows.
        labels: names of the student's classes.
        teacher: its name, for messages.

    Raises:
        RecipeError: the file cannot be read, or a line is neither.
        ModelError: a class that the teacher does not have, or a teacher whose identifiers timm does not list.
    """
    entries = _entries(given, labels)
    where = given if isinstance(given, str) else "classes"
    if all(_SYNSET.fullmatch(entry) for entry in entries):
        return _by_synset(entries, known, teacher, where)
    found = []
    for line, entry in enumerate(entries, 1):
        if not re.fullmatch(r"-?\d+", entry):
            raise RecipeError(
                f"{where}, class {line}: {entry!r} is neither the number of one of {teacher}'s classes nor a "
                "WordNet identifier such as n01440764, as all lines must be"
            )
        if not UNKNOWN <= int(entry) < known:
            raise ModelError(
                f"{where}, class {line}: {teacher} knows classes 0 to {known - 1}, and {entry} is asked for; "
                f"{UNKNOWN} stands for a class that it does not know"
            )
        found.append(int(entry))
    return tuple(found)


def gathered(logits: Tensor, classes: Tensor) -> Tensor:
    """The logits (B, C') of `classes` (C',) out of (B, C).

    A class that the teacher does not know is as unlikely as the least likely of those that it knows: a logit
    of minus infinity would make its divergence infinite.
    """
    kept = logits.index_select(-1, classes.clamp_min(0))
    unknown = classes < 0
    lowest = kept.masked_fill(unknown, torch.inf).amin(-1, keepdim=True)
    return torch.where(unknown, lowest, kept)


def _entries(given: str | Sequence[int], labels: Sequence[str]) -> list[str]:
    if given == LABELS:
        if other := [label for label in labels if not _SYNSET.fullmatch(label)]:
            raise RecipeError(
                f"classes: {LABELS} needs classes named by WordNet identifiers, and one is {other[0]!r}; "
                "name a file with one line a class instead"
            )
        entries = list(labels)
    elif isinstance(given, str):
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the class map {given}: {error}") from error
        lines = (line.split("#")[0].strip() for line in text.splitlines())
        entries = [line for line in lines if line]
    else:
        entries = [str(number) for number in given]
    if not entries or all(entry == str(UNKNOWN) for entry in entries):
        raise RecipeError(f"the class map {given if isinstance(given, str) else 'classes'} names no class")
    return entries


def _by_synset(entries: Sequence[str], known: int, teacher: str, where: str) -> tuple[int, ...]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": known})
    if subset is None:
        raise ModelError(
            f"{where}: timm lists the WordNet identifiers of ImageNet's releases, and none has the {known} "
            f"classes of {teacher}; give the numbers of its classes instead"
        )
    numbers = {name: number for number, name in enumerate(ImageNetInfo(subset).label_names())}
    found = tuple(numbers.get(entry, UNKNOWN) for entry in entries)
    if set(found) == {UNKNOWN}:
        raise ModelError(f"{where}: {subset}, which {teacher} knows by its {known} classes, has none of them")
    return found
