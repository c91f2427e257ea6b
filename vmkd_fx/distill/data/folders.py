"""A folder of class folders: what is wrong with it, and the order of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from vmkd_fx.errors import DataError

_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}


def part_of(root: Path, part: str) -> Path:
    """The folder or tar file that holds the "train" or "val" images below `root`.

    Raises:
        DataError: there is none.
    """
    for name in _NAMES[part]:
        for path in (root / name, root / f"{name}.tar"):
            if path.is_dir() or (path.suffix == ".tar" and path.is_file()):
                return path
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; data.root is the folder that holds train/ and val/")
    found = sorted(item.name for item in root.iterdir())
    raise DataError(
        f"{root} has no folder {part} (nor {part}.tar); expected {root}/{part}/CLASS/IMAGE.jpg, "
        f"found {', '.join(found[:8]) or 'nothing'}{', ...' if len(found) > 8 else ''}"
    )


def check_folder(part: Path, reader: Any, empty_ones: bool) -> list[str]:
    """The class folders of `part` without an image.

    Raises:
        DataError: there are some and `empty_ones` is False: without them the classes would be renumbered.
    """
    if not part.is_dir():
        return []
    with_images = {Path(path).relative_to(part).parts[0] for path, _ in reader.samples}
    empty = sorted(item.name for item in part.iterdir() if item.is_dir() and item.name not in with_images)
    if empty and not empty_ones:
        raise DataError(
            f"{len(empty)} class folders of {part} hold no image ({', '.join(get_img_extensions())}): "
            f"{', '.join(empty[:8])}{', ...' if len(empty) > 8 else ''}; fill or remove them"
        )
    return empty


def check_leaves(part: Path, reader: Any) -> None:
    """A class is one folder: timm names it by its last part, wherever it lies.

    Raises:
        DataError: two folders have the same name.
    """
    homes: dict[str, Path] = {}
    for path, _ in reader.samples:
        home = Path(path).parent
        if homes.setdefault(home.name, home) != home:
            raise DataError(
                f"{part} holds two folders of the class {home.name!r}: {homes[home.name]} and {home}; "
                "a class is one folder"
            )


def in_fixed_order(reader: Any) -> None:
    """Sort the images of timm's reader of folders, by name as a person would.

    timm leaves names that such a sorting does not tell apart (1.jpg and 01.JPG) in the order in which the
    file system hands them out, and the number of an image decides what happens to it.
    """
    reader.samples.sort(key=lambda sample: (natural_key(sample[0]), sample[0]))
