"""`vmkd cache` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.distill.cache.recipes import recipe
from vmkd_fx.cli import main


def recipe_file(folder: Path, method: str = "{preset: kd, temperature: 1.0}") -> Path:
    content = recipe(folder).model_dump(mode="json", include={"student", "data", "train"}, exclude_unset=True)
    content |= {"out": str(folder / "run"), "method": yaml.safe_load(method)}
    content["teachers"] = [{"model": "test_resnet", "checkpoint": str(folder / "teacher.safetensors")}]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_cache_and_a_training_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(recipe_file(tmp_path)), str(tmp_path / "cache")
    assert main(["cache", path, "train.epochs=2", "--out", out, "--top-k", "3", "--epochs", "0:1"]) == 0
    said = capsys.readouterr()
    assert "0-test_resnet: 1 epochs of 90 images, the top 3 of 10 classes in float16" in said.out
    assert "28 bytes an image and epoch" in said.out
    assert "TinyViT's cache has 404" in said.out
    use = [path, f"teachers=[{{cache: {out}}}]", "train.epochs=2", "train.evaluate_every=2"]
    assert main(["train", *use]) == 2
    assert "lacks 1 of the 2 files of 2 epochs, the first in epoch 1" in capsys.readouterr().err
    assert main(["cache", path, "train.epochs=2", "--out", out, "--top-k", "3", "--epochs", "1:2"]) == 0
    assert main(["train", *use, "--dry-run"]) == 0
    assert f"cache {out}" in capsys.readouterr().out
    assert main(["train", *use]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_what_it_says_of_a_soft_method_and_of_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = str(recipe_file(tmp_path, "{preset: kd, temperature: 4.0}")), tmp_path / "cache"
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["cache", path, "--out", str(out), "--top-k", "2"]) == 0
        said = capsys.readouterr()
        assert len(list(out.rglob("*.safetensors"))) == (3 if rank == 0 else 2)
        assert ("kd softens at temperature 4.0" in said.err) == (rank == 0)
    assert "--full keeps all of them in 32 bytes" in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "3"], "write epochs as A:B with A below B"),
        (["--epochs", "3:3"], "write epochs as A:B with A below B"),
        (["--full", "--top-k", "5"], "not allowed with argument"),
        (["--dtype", "bfloat16"], "invalid choice"),
    ],
)
def test_options_that_cannot_be(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cache", "recipe.yaml", *options])
    assert message in capsys.readouterr().err


def test_refusals_go_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe_file(tmp_path))
    assert main(["cache", path, "method=fitnet"]) == 2
    assert (
        "vmkd cache: the method fitnet reads features of the teacher test_resnet" in capsys.readouterr().err
    )
