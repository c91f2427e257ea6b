"""The command line: what it prints, and one clear message for everything that is wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from tests.slow import rest_slow
from vmkd_fx.cli import VERBS, main
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.distill.methods import PRESETS

RECIPE = {
    "student": {"model": "mixer_nano_32", "options": {"img_size": 16}},
    "data": {"name": "digits", "labelled": 40, "image_size": 16},
    "train": {"epochs": 2, "batch_size": 20},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, content: dict) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a short training."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", write(folder / "r.yaml", RECIPE), f"out={folder / 'run'}"]) == 0
    return folder / "run" / "last.safetensors"


@pytest.fixture(scope="module")
def _deployed(trained: Path) -> Path:
    out = trained.parent / "bundle"
    assert main(["deploy", str(trained), "--out", str(out)]) == 0
    return out


@pytest.fixture
def bundle(_deployed: Path, folder: Path) -> Path:
    """`bundle` in the current folder, which the test may spoil."""
    return Path(shutil.copytree(_deployed, folder / "bundle"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"vmkd {arguments[0]}: ")
    assert "Traceback" not in message
    return message


def test_the_road_from_recipe_to_prediction(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = {**RECIPE, "student": {"model": "test_resnet"}, "out": "teacher"}
    assert main(["train", write(folder / "teacher.yaml", teacher)]) == 0
    student = {
        **RECIPE,
        "teachers": [{"model": "test_resnet", "checkpoint": "teacher/last.safetensors"}],
        "method": "std",
        "out": "std",
    }
    recipe = write(folder / "std.yaml", student)
    assert main(["train", recipe, "train.epochs=1"]) == 0
    assert re.search(r"accuracy \d+\.\d\d % after 2 steps: std/last.safetensors", capsys.readouterr().out)

    assert main(["deploy", "std/last.safetensors", "--predict", "mean", "--judge", "50"]) == 0
    printed = capsys.readouterr().out
    assert "accuracy by prediction: class" in printed
    assert "accuracy is that of 50 of 797 held-out images, evenly spaced" in printed
    assert "onnx" in printed
    assert read_bundle("bundle").manifest.labels == tuple("0123456789")

    Image.new("L", (20, 20), 90).save("grey.png")
    assert main(["run", "bundle", "grey.png", "--device", "cpu", "--top", "3"]) == 0
    assert re.fullmatch(r"grey\.png: (\d \d+\.\d %(, )?){3}\n", capsys.readouterr().out)


@pytest.mark.engine
@pytest.mark.usefixtures("bundle")
def test_build_adds_an_engine(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert main(["build", "bundle", "--target", "tensorrt-rtx:sm86,sm120"]) == 0
    assert "sm86,sm120" in capsys.readouterr().out
    assert "model.tensorrt-rtx-sm86-sm120.engine" in read_bundle("bundle").manifest.files


def test_weights_by_someone_else_need_their_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm

    model = timm.create_model("test_resnet", num_classes=10)
    save_file(model.state_dict(), folder / "w.safetensors")
    assert "name it: --model NAME" in refused(capsys, "deploy", "w.safetensors")
    arguments = ["deploy", "w.safetensors", "--model", "test_resnet", "--option", "num_classes=10"]
    assert main(arguments) == 0
    wrong = refused(capsys, "deploy", "w.safetensors", "--model", "test_vit", "--option", "num_classes=10")
    assert "w.safetensors belongs to another model" in wrong
    assert "missing" in wrong


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "test_vit", "--option", "num_classes=7"]) == 0
    printed = capsys.readouterr().out
    assert "mixes tokens (attention); channels only" in printed
    assert "7 classes" in printed
    assert re.search(r"std-intermediate +yes", printed)


MODELS = """
import timm
import torch

def resnet(**options):
    model = timm.create_model("test_resnet", **options)
    del model.pretrained_cfg, model.default_cfg, model._traits
    return model

def deciding():
    class Deciding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 2)
        def forward(self, x):
            if x.mean() > 0:
                x = -x
            return self.head(x.mean((2, 3)))
    return Deciding()
"""


def test_inspect_a_model_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text(MODELS)
    assert main(["inspect", "mine:resnet", "--option", "num_classes=7", "--input-size", "3,64,64"]) == 0
    printed = capsys.readouterr().out
    assert "ResNet: 4 blocks in 4 stages, 7 classes" in printed
    assert "at 3 x 64 x 64" in printed
    assert "vmkd inspect: ResNet does not say how large" in refused(capsys, "inspect", "mine:resnet")


def test_a_forward_that_depends_on_data_is_refused_with_its_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.py").write_text(MODELS)
    message = refused(capsys, "inspect", "mine:deciding", "--input-size", "3,32,32")
    assert "decides by the data" in message
    assert "mine.py:16: if x.mean() > 0:" in message


def test_what_a_model_lacks_for_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "test_vit", "--option", "num_classes=0"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"std +test_vit was made without a classifier \(num_classes=0\)", printed)


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"vitkd +ViTKD, Yang et al., 2022 .* alpha=3e-05, beta=3e-06, ratio=0.5", printed)
    assert [line.split()[0] for line in printed.splitlines()[2:-2]] == list(PRESETS)
    assert main(["recipes", "vitkd+nkd"]) == 0
    printed = capsys.readouterr().out
    assert "generator (conv): " in printed
    assert "gamma (1.5): " in printed
    assert "no method 'vitk'; did you mean 'vitkd'" in refused(capsys, "recipes", "vitk")


LOWERS = """
import torch
from vmkd_fx.passes.rewrite import LoweringPass

def run(rewrite):
    for node in rewrite.calls(torch.ops.aten.gelu):
        if rewrite.take(node, "gelu by its tanh form"):
            tanh = rewrite.call(torch.ops.aten.gelu.default, node.args[0], approximate="tanh")
            rewrite.replace(node, tanh)

TANH = LoweringPass("tanh", run)
"""
TINY = (
    "vit_tiny_patch16_224",
    *(f"--option={given}" for given in ("img_size=32", "depth=1", "embed_dim=48")),
)


@pytest.mark.parametrize("passes", [(), ("--passes", "constants,circulant")])
def test_lower_measures_on_this_machine(passes: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--option={given}" for given in ("img_size=32", "patch_size=8", "embed_dim=24", "depth=2")]
    line = ["lower", "gfnet_ti", "--target", "torch", "--autotune", "--input-size", "3,32,32", *options]
    assert main([*line, *passes]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"2 as [\w-]+.* ms\s+measured", printed)
    assert "cost model" not in printed


def test_lower_prints_the_ledger(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lower", "test_resnet", "--target", "torch", "--onnx", "m.onnx"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"^channel_affine +15 .* 15 into the layer before$", printed.out, re.MULTILINE)
    assert re.search(r"from training graph to lowered: nodes \d+ -> \d+ \(-\d+\.\d %\)", printed.out)
    assert re.search(r"^onnx .* opset 20", printed.out, re.MULTILINE)
    assert (folder / "m.onnx").stat().st_size > 1e5
    assert max(map(len, printed.out.splitlines())) <= 120
    assert "m.onnx holds fresh weights; --option pretrained=true" in printed.err


def test_lower_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lower", "test_resnet", "--passes", "constants,channel_affine", "--explain", "bn1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^channel_affine +batch_norm_2 +bn1 +rewrote it: into the layer", printed, re.MULTILINE)
    assert "training graph" not in printed
    message = refused(capsys, "lower", "test_resnet", "--passes", "", "--explain", "layer9.0.bn1")
    assert "test_resnet: there is no node or module 'layer9.0.bn1'; did you mean " in message


def test_lower_and_bisect_with_a_wrong_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mypasses.py").write_text(LOWERS)
    passes = ("--passes", "constants,mypasses:TANH")
    message = refused(capsys, "lower", *TINY, *passes)
    assert "pass tanh on vit_tiny_patch16_224, at gelu: differs" in message
    assert "--keep-going" in message
    assert main(["lower", *TINY, *passes, "--keep-going"]) == 0
    assert "tanh left 1 site alone: rolled back: differs" in capsys.readouterr().out
    assert main(["bisect", *TINY, *passes]) == 2
    printed = capsys.readouterr()
    assert "its first bad site is gelu" in printed.out
    assert printed.err == "vmkd bisect: the pass tanh is wrong on vit_tiny_patch16_224\n"
    assert main(["bisect", *TINY, "--passes", "constants"]) == 0
    assert "every pass is right on vit_tiny_patch16_224" in capsys.readouterr().out


def test_lower_a_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lower", str(trained), "--passes", "constants", "-v"]) == 0
    assert "from training graph to lowered" in capsys.readouterr().out
    options = ("--option", "depth=3")
    assert "goes with --model NAME" in refused(capsys, "lower", str(trained), *options)


@pytest.mark.slow
def test_sweep(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--pattern", "test_resnet", "--jobs", "1", "--full"]) == 0
    assert "1 of 1 models without a fault: sweep-out/coverage.md" in capsys.readouterr().out
    table = (folder / "sweep-out" / "coverage.md").read_text()
    assert "| right on real numbers | 1 of 1 tried |" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "mixer_s16_22"), "no timm model 'mixer_s16_22'; did you mean 'mixer_s16_224'"),
        (("inspect", "test_vit", "--option", "img_sz=3"), "img_sz"),
        (("inspect", "test_vit", "--option", "img_size"), "write it as name=value"),
        (("inspect", "nowhere.models:build"), "nowhere"),
        (("inspect", "timm:create_modle"), "create_model"),
        (("sweep", "--pattern", "resnet_fifty"), "no timm model that fits 'resnet_fifty'"),
        (("train", "nothing.yaml"), "nothing.yaml"),
        (("deploy", "nothing.safetensors"), "there is no weights file nothing.safetensors"),
        (("lower", "resnet81"), "no timm model 'resnet81'; did you mean 'resnet18'"),
        (("lower", "resnet18", "--target", "tensort"), "no target 'tensort'; did you mean 'tensorrt'"),
        (("lower", "resnet18", "--passes", "chanel_affine"), "no pass 'chanel_affine'; did you mean"),
        (("lower", "resnet18", "--passes", "channel_affine,constants"), "has to follow 'constants', for it"),
        (("lower", "nothing.safetensors"), "there is no weights file nothing.safetensors"),
        (("lower", "test_vit", "--predict", "mean"), "needs distillation heads, and test_vit has none"),
        (("bisect", "resnet81"), "no timm model 'resnet81'"),
        (("bisect", "resnet18", "--target", "tensort"), "no target 'tensort'"),
        (("build", "nothing", "--target", "tensorrt-rtx"), "no ONNX file and no bundle nothing"),
        (("build", "nothing", "--target", "tensort"), "no target 'tensort'; did you mean 'tensorrt'"),
        (("build", "nothing", "--target", "tensorrt-rtx:sm99"), "no compute capability 'sm99'"),
        (("run", "nothing", "x.png"), "nothing is not a bundle"),
    ],
)
def test_wrong_names(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"epochs": 2, "optimiser": "adamw"}}, "no key 'optimiser'; did you mean 'optimizer'"),
        ({"student": {"model": "mixer_nano"}}, "no model 'mixer_nano'; did you mean 'mixer_nano_32'"),
        ({"method": "sdt", "teachers": [{"model": "test_resnet"}]}, "no method 'sdt'; did you mean 'std'"),
        (
            {"student": {"model": "mixer_nano_32", "options": {"img_size": 16, "num_classes": 7}}},
            "knows 7 classes",
        ),
        ({"method": "std"}, "needs a teacher"),
        ({"student": {"model": "mixer_nano_32"}}, "made for images of 32 x 32: data.image_size=32"),
        (
            {"method": "std", "teachers": [{"model": "test_resnet", "options": {"num_classes": 7}}]},
            "test_resnet knows 7 classes and student mixer_nano_32 10",
        ),
    ],
)
def test_wrong_recipes(folder: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str) -> None:
    recipe = write(folder / "r.yaml", {**RECIPE, "out": "run", **change})
    assert message in refused(capsys, "train", recipe)
    assert not (folder / "run").exists()


def test_a_folder_of_another_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(folder / "r.yaml", {**RECIPE, "out": "run"})
    assert main(["train", recipe]) == 0
    assert "another recipe" in refused(capsys, "train", recipe, "train.lr=0.5")
    assert main(["train", recipe, "--restart", "train.lr=0.5"]) == 0
    with pytest.raises(SystemExit):
        main(["train", recipe, "--restart", "train.lr=0.5", "nothing"])
    assert "unrecognized arguments: train.lr=0.5 nothing" in capsys.readouterr().err


def test_a_changed_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = bundle / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    Image.new("L", (20, 20)).save("grey.png")
    assert "model.onnx was changed: its SHA-256 is" in refused(capsys, "run", "bundle", "grey.png")


def test_a_place_that_cannot_be_written(
    trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "r.yaml", RECIPE)
    (folder / "file").touch()
    assert "cannot write" in refused(capsys, "deploy", str(trained), "--out", "file/bundle")
    assert "cannot write" in refused(capsys, "train", "r.yaml", "out=file/run")
    assert "cannot write" in refused(capsys, "lower", "no_such_model", "--onnx", "file/m.onnx")


def test_weights_that_are_no_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "junk.safetensors").write_bytes(b"junk")
    assert "cannot read junk.safetensors as safetensors" in refused(capsys, "lower", "junk.safetensors")
    assert "cannot read junk.safetensors as safetensors" in refused(capsys, "deploy", "junk.safetensors")
    torch.save({"state_dict": "no"}, folder / "junk.pth")
    assert "junk.pth" in refused(capsys, "deploy", "junk.pth", "--model", "test_vit")


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"example: vmkd {verb}" in capsys.readouterr().out


def test_a_full_disk_behind_standard_output() -> None:
    command = [sys.executable, "-m", "vmkd_fx", "recipes"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "vmkd recipes: No space left on device\n"


@pytest.mark.parametrize("arguments", [("demo", "--seed", "-1"), ("run", "b", "x.png", "--top", "0")])
def test_numbers_that_cannot_be(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert f"{arguments[-1]} is not " in capsys.readouterr().err


@pytest.mark.parametrize("package", rest_slow(["pydantic", "yaml", "safetensors", "timm"]))
def test_a_half_installed_extra_is_named(package: str, folder: Path) -> None:
    recipe = write(folder / "r.yaml", {**RECIPE, "out": "run"})
    code = (
        f"import sys; sys.modules[{package!r}] = None; "
        f"from vmkd_fx.cli import main; sys.exit(main(['train', {recipe!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'vmkd-fx[train]'" in done.stderr
    assert "Traceback" not in done.stderr
