"""A model by name: timm's, or a factory of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from vmkd_fx.cli import main
from vmkd_fx.distill.card import create_model
from vmkd_fx.distill.checkpoint import save_weights
from vmkd_fx.distill.recipe import ModelConfig
from vmkd_fx.errors import ModelError, RecipeError, UnknownNameError
from vmkd_fx.models.named import named_model

SOURCE = '''
import timm
from torch import nn

NUMBER = 3

def tiny(num_classes=10, width=4):
    """A model that needs a neighbour, imported only now."""
    from own_package.layers import Pool
    return nn.Sequential(nn.Conv2d(3, width, 3), Pool(), nn.Flatten(), nn.Linear(width, num_classes))

def timms(**options):
    return timm.create_model("test_resnet", **options)

def text():
    return "a model"

def broken():
    raise KeyError("weights")

class Net(nn.Linear):
    pass
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory with a package of the user's."""
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "models.py").write_text(SOURCE)
    (package / "layers.py").write_text(
        "from torch import nn\n\ndef Pool():\n    return nn.AdaptiveAvgPool2d(1)\n"
    )
    (package / "needy.py").write_text("import a_package_that_is_not_there\n")
    (package / "wrong.py").write_text("def model(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "own_package"]:
        del sys.modules[name]


def test_a_name_of_timm() -> None:
    model = named_model("test_resnet", {"num_classes": 7})
    assert model.num_classes == 7
    assert named_model("mixer_nano_32", {}).pretrained_cfg["architecture"] == "mixer_nano_32"


def test_a_name_that_timm_does_not_have() -> None:
    with pytest.raises(UnknownNameError, match="no timm model 'resnet5'; did you mean"):
        named_model("resnet5", {})


@pytest.mark.parametrize(
    "options",
    [{"num_classses": 7}, {"global_pool": "nope"}, {"act_layer": "nope"}],
    ids=["unknown", "refused", "unknown value"],
)
def test_options_that_timm_does_not_take(options: dict) -> None:
    with pytest.raises(RecipeError, match="timm cannot create 'resnet18' with options") as caught:
        named_model("resnet18", options)
    assert str(options) in str(caught.value)


def test_a_factory_in_the_current_directory(here: Path) -> None:
    path = list(sys.path)
    model = named_model("own_package.models:tiny", {"num_classes": 5, "width": 6})
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    assert model[0].out_channels == 6
    assert sys.path == path
    assert isinstance(named_model("own_package.models:Net", {"in_features": 2, "out_features": 3}), nn.Linear)


@pytest.mark.usefixtures("here")
def test_a_factory_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A console script does not have the current directory in its path, `vmkd inspect` finds it there."""
    assert main(["inspect", "own_package.models:timms", "--option", "num_classes=7"]) == 0
    assert "test_resnet" in capsys.readouterr().out


def test_the_search_path_is_restored_after_a_failure(here: Path) -> None:
    path = list(sys.path)
    with pytest.raises(RecipeError):
        named_model("own_package.models:broken", {})
    assert sys.path == path


def test_a_factory_takes_a_checkpoint(here: Path, tmp_path: Path) -> None:
    config = ModelConfig(model="own_package.models:tiny", options={"num_classes": 5})
    weights = named_model(config.model, config.options)
    save_weights(tmp_path / "own.safetensors", weights)
    loaded = create_model(config.model_copy(update={"checkpoint": str(tmp_path / "own.safetensors")}))
    assert torch.equal(loaded[0].weight, weights[0].weight)
    assert not torch.equal(create_model(config)[0].weight, weights[0].weight)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no_such_package.models:tiny", RecipeError, "there is no module 'no_such_package' in "),
        ("own_package.modles:tiny", RecipeError, "there is no module 'own_package.modles' in "),
        (
            "own_package.models:tyni",
            UnknownNameError,
            "models: there is no factory 'tyni'; did you mean 'tiny'",
        ),
        ("own_package.models:NUMBER", RecipeError, "is of type int and cannot be called"),
        ("own_package.models:text", ModelError, "returned str; a factory returns a torch.nn.Module"),
        ("own_package.models:broken", RecipeError, r"failed with options \{\}: KeyError: 'weights'"),
        (
            "own_package.needy:tiny",
            RecipeError,
            "importing own_package.needy failed: ModuleNotFoundError: No mod",
        ),
        ("own_package.wrong:model", RecipeError, "importing own_package.wrong failed: SyntaxError"),
        ("own-package:tiny", RecipeError, "give the name of a timm model, or package.module:factory"),
        ("local-dir:somewhere", RecipeError, "'local-dir:somewhere' is no name of a model"),
        (":tiny", RecipeError, "is no name of a model"),
        ("own_package.models:", RecipeError, "is no name of a model"),
    ],
)
def test_refusals(here: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        named_model(name, {})


def test_options_that_a_factory_does_not_take(here: Path) -> None:
    with pytest.raises(RecipeError, match=r"tiny failed with options \{'depth': 2\}: TypeError.*'depth'"):
        named_model("own_package.models:tiny", {"depth": 2})
