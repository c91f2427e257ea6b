"""Class maps: numbers, files, WordNet identifiers, and classes that the teacher does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.data import ImageNetInfo

from vmkd_fx.distill.class_maps import gathered, read_class_map
from vmkd_fx.errors import ModelError, RecipeError

TENCH, GOLDFISH, TEDDY = "n01440764", "n01443537", "n04399382"


def test_numbers_from_a_list_and_from_a_file(tmp_path: Path) -> None:
    assert read_class_map([3, 0, -1], 4) == (3, 0, -1)
    file = tmp_path / "map.txt"
    file.write_text("# the teacher's class of each of ours\n3  # cat\n0\n\n-1\n")
    assert read_class_map(str(file), 4) == (3, 0, -1)


def test_wordnet_identifiers_of_the_teachers_release(tmp_path: Path) -> None:
    release = ImageNetInfo("imagenet-12k").label_names()
    file = tmp_path / "map.txt"
    file.write_text(f"{GOLDFISH}\n{TENCH}\n")
    found = read_class_map(str(file), 11821)
    assert [release[number] for number in found] == [GOLDFISH, TENCH]
    assert read_class_map("labels", 11821, [GOLDFISH, TENCH]) == found


def test_imagenet_1k_in_the_releases_that_teachers_know() -> None:
    own = ImageNetInfo("imagenet-1k").label_names()
    for known, unknown in ((1000, 0), (11821, 7), (11221, 9), (21841, 1), (21843, 1)):
        found = read_class_map("labels", known, own)
        assert len(found) == 1000
        assert found.count(-1) == unknown, known
    assert read_class_map("labels", 1000, own) == tuple(range(1000))


def test_logits_are_gathered_and_unknown_classes_are_the_least_likely() -> None:
    logits = torch.tensor([[5.0, 1.0, 2.0, -3.0], [0.0, 4.0, 1.0, 9.0]])
    found = gathered(logits, torch.tensor([2, -1, 0]))
    assert found.tolist() == [[2.0, 2.0, 5.0], [1.0, 0.0, 0.0]]
    kept = gathered(logits, torch.tensor([2, 0])).softmax(-1)
    torch.testing.assert_close(kept, logits[:, [2, 0]].softmax(-1))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"classes, class 2: the teacher knows classes 0 to 3, and 4 is asked"
    ):
        read_class_map([0, 4], 4)
    with pytest.raises(RecipeError, match=r"cannot read the class map .*nowhere.txt"):
        read_class_map(str(tmp_path / "nowhere.txt"), 4)
    file = tmp_path / "map.txt"
    for text, message in (
        ("", "names no class"),
        ("-1\n-1\n", "names no class"),
        ("0\ncat\n", r"map.txt, class 2: 'cat' is neither the number"),
        (f"0\n{TENCH}\n", rf"class 2: '{TENCH}' is neither the number"),
    ):
        file.write_text(text)
        with pytest.raises(RecipeError, match=message):
            read_class_map(str(file), 1000)
    with pytest.raises(ModelError, match=r"none has the 77 classes of swin"):
        read_class_map("labels", 77, [TENCH], "swin")
    with pytest.raises(ModelError, match=r"imagenet-1k, which .* has none of them"):
        read_class_map("labels", 1000, ["n99999999"])
    with pytest.raises(RecipeError, match="needs classes named by WordNet identifiers, and one is 'cat'"):
        read_class_map("labels", 1000, ["cat"])
