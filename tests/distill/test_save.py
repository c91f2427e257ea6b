"""The student comes out: training checkpoints minus our prefix are timm checkpoints, in both directions, and
`save` writes a folder that timm loads.
"""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn

import vmkd_fx as vx
from tests.checks import assert_same_module, fingerprint
from tests.models import images, renamed, small
from vmkd_fx.distill import save as module_under_test
from vmkd_fx.distill.checkpoint import load_weights, save_weights
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.errors import CheckpointError, ModelError, OutputError, RecipeError, VerificationError
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.models import register

register()
DEIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
STUDENTS: dict[str, dict[str, Any]] = {
    "mixer_nano_32": {"num_blocks": 2, "embed_dim": 24},
    "deit_tiny_patch16_224": DEIT,
}
both = pytest.mark.parametrize("name", STUDENTS)


def plain(name: str, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **{"num_classes": 10, **STUDENTS.get(name, {}), **options})


def wrapped(student: nn.Module) -> DistillationTask:
    torch.manual_seed(9)
    return vx.wrap(student, "std", [timm.create_model("test_resnet", num_classes=10)])


def trained(name: str, steps: int = 3, **options: Any) -> DistillationTask:
    """A task after some steps; weights, heads included, have left where they began."""
    task = wrapped(plain(name, **options)).train()
    if steps:
        task.setup_ema(decay=0.5)
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        task(images(4, seed=step), torch.arange(4))["loss"].backward()
        optimizer.step()
        task.update_ema(step=step + 1)
    return task


def forgetful(model: Any) -> TracedModule:
    """A traced student that does not know what timm made it with."""
    module = vx.trace(model)
    module.meta["info"] = replace(module.info, options={})
    return module


def without_prefix(module: nn.Module) -> dict[str, torch.Tensor]:
    state = {key: value for key, value in module.state_dict().items() if not key.startswith("vmkd.")}
    assert len(state) < len(module.state_dict())
    return state


@torch.no_grad()
def logits(module: nn.Module) -> torch.Tensor:
    out = module.eval()(images(3, seed=7))
    return out["logits"] if isinstance(out, dict) else out


# Checkpoints


@both
def test_a_training_checkpoint_minus_the_prefix_is_timms(name: str) -> None:
    task = trained(name)
    bare = plain(name, seed=1)
    before = logits(bare)
    bare.load_state_dict(without_prefix(task.trainable_module), strict=True)
    assert torch.equal(logits(bare), logits(task.trainable_module))
    assert not torch.equal(logits(bare), before)


@both
def test_so_it_is_through_files(name: str, tmp_path: Path) -> None:
    task = trained(name)
    save_weights(tmp_path / "ours.safetensors", task.trainable_module)
    bare = plain(name, seed=1)
    with pytest.raises(CheckpointError, match=r'keys under "vmkd." are left out by drop_prefix=True'):
        load_weights(bare, tmp_path / "ours.safetensors")
    load_weights(bare, tmp_path / "ours.safetensors", drop_prefix=True)
    assert torch.equal(logits(bare), logits(task.trainable_module))


@both
def test_the_checkpoint_of_a_timm_loop_is_the_students_own(name: str, tmp_path: Path) -> None:
    task = trained(name)
    torch.save(task.get_checkpoint_state(), tmp_path / "timms.pth")
    bare = plain(name, seed=1)
    load_weights(bare, tmp_path / "timms.pth")
    assert torch.equal(logits(bare), logits(task.trainable_module))


@both
def test_a_timm_checkpoint_loads_into_a_wrapped_student(name: str, tmp_path: Path) -> None:
    source = plain(name, seed=5)
    nn.init.normal_(source.head.weight)
    save_file(source.state_dict(), tmp_path / "plain.safetensors")
    torch.save({"arch": name, "epoch": 3, "state_dict": source.state_dict()}, tmp_path / "checkpoint.pth.tar")

    for file in ("plain.safetensors", "checkpoint.pth.tar"):
        task = wrapped(plain(name))
        heads = {k: v.clone() for k, v in task.trainable_module.state_dict().items() if k.startswith("vmkd.")}
        load_weights(vx.strip(task), tmp_path / file)
        assert torch.equal(logits(task.trainable_module), logits(source))
        now = task.trainable_module.state_dict()
        assert heads and all(torch.equal(now[key], value) for key, value in heads.items())


@both
def test_it_loads_by_torchs_own_call_too(name: str) -> None:
    source = plain(name, seed=5)
    nn.init.normal_(source.head.weight)
    student = wrapped(plain(name)).trainable_module
    result = student.load_state_dict(source.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys == [key for key in student.state_dict() if key.startswith("vmkd.")]
    assert torch.equal(logits(student), logits(source))


@both
@pytest.mark.parametrize("how", ["task", "ModelEmaV3"])
def test_averaged_weights_minus_the_prefix_are_timms(name: str, how: str, tmp_path: Path) -> None:
    task = trained(name)
    if how == "task":
        average = task.trainable_module_ema
    else:
        average = ModelEmaV3(task.trainable_module, decay=0.5)
        with torch.no_grad():
            for parameter in task.trainable_module.parameters():
                parameter.add_(0.1)
        average.update(task.trainable_module, step=2)
    bare = plain(name, seed=1)
    bare.load_state_dict(without_prefix(average.module), strict=True)
    assert torch.equal(logits(bare), logits(average.module))
    assert not torch.equal(logits(bare), logits(task.trainable_module))

    vx.save(average.module, tmp_path / "out", options=STUDENTS[name])
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(average.module))


def test_the_averaged_weights_of_a_checkpoint_win_as_in_timm(tmp_path: Path) -> None:
    task = trained("mixer_nano_32")
    torch.save({**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}, tmp_path / "both.pth")
    bare = plain("mixer_nano_32", seed=1)
    load_weights(bare, tmp_path / "both.pth", drop_prefix=True)
    assert torch.equal(logits(bare), logits(task.trainable_module_ema.module))


# save


def loaded(folder: Path) -> nn.Module:
    torch.manual_seed(4)
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


@both
@pytest.mark.parametrize("kind", ["task", "graph", "plain"])
def test_timm_loads_what_was_saved(name: str, kind: str, tmp_path: Path) -> None:
    task = trained(name)
    student = {"task": task, "graph": task.trainable_module, "plain": vx.strip(task)}[kind]
    folder = vx.save(student, tmp_path / "a" / "out", labels=list("abcdefghij"), options=STUDENTS[name])
    assert folder == tmp_path / "a" / "out"
    assert {item.name for item in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert [item.name for item in folder.parent.iterdir()] == ["out"]

    back = loaded(folder)
    assert torch.equal(logits(back), logits(task.trainable_module))
    assert list(back.state_dict()) == list(without_prefix(task.trainable_module))
    assert back.pretrained_cfg["label_names"] == list("abcdefghij")


@both
def test_a_plain_model_knows_its_options(name: str, tmp_path: Path) -> None:
    model = plain(name)
    back = loaded(vx.save(model, tmp_path / "out"))
    assert torch.equal(logits(back), logits(model))


def test_a_student_needs_only_timm(tmp_path: Path) -> None:
    task = trained("deit_tiny_patch16_224")
    folder = vx.save(task, tmp_path / "out", options=DEIT)
    save_file({"images": images(3, seed=7), "logits": logits(task.trainable_module)}, tmp_path / "expected")
    code = (
        "import sys, timm, torch; from safetensors.torch import load_file\n"
        f"model = timm.create_model('local-dir:{folder}', pretrained=True).eval()\n"
        f"expected = load_file('{tmp_path / 'expected'}')\n"
        "with torch.no_grad(): print(torch.equal(model(expected['images']), expected['logits']))\n"
        "print(any(name.startswith('vmkd') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_what_is_written_down(tmp_path: Path) -> None:
    model = plain("test_vit", img_size=64, in_chans=1, drop_rate=0.1)
    model.pretrained_cfg.update(mean=(0.3,), std=(0.2,), crop_pct=0.9, interpolation="bilinear")
    written = json.loads((vx.save(model, tmp_path / "out") / "config.json").read_text())
    assert written["architecture"] == "test_vit"
    assert (written["num_classes"], written["num_features"]) == (10, model.num_features)
    options = written["model_args"]
    assert (options["img_size"], options["in_chans"], options["num_classes"]) == ([64, 64], 1, 10)
    assert "drop_rate" not in options
    images = {key: written["pretrained_cfg"][key] for key in ("input_size", "mean", "std")}
    assert images == {"input_size": [1, 64, 64], "mean": [0.3], "std": [0.2]}
    assert written["pretrained_cfg"]["crop_pct"] == 0.9
    assert written["pretrained_cfg"]["interpolation"] == "bilinear"
    assert not {"license", "tag", "hf_hub_id", "url", "origin_url"} & set(written["pretrained_cfg"])
    assert "label_names" not in written


def test_where_weights_came_from_is_no_option(tmp_path: Path) -> None:
    options = {**DEIT, "pretrained": True, "drop_path_rate": 0.1}
    folder = vx.save(trained("deit_tiny_patch16_224"), tmp_path / "out", options=options)
    assert "pretrained" not in json.loads((folder / "config.json").read_text())["model_args"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = plain("test_vit").to(dtype)
    folder = vx.save(model, tmp_path / "out")
    assert torch.equal(logits(loaded(folder)), logits(model.float()))


def test_what_is_given_is_left_alone(tmp_path: Path) -> None:
    model = plain("test_vit").train()
    before, state = fingerprint(model), torch.get_rng_state()
    vx.save(model, tmp_path / "out")
    assert_same_module(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_saved_student_is_replaced_and_an_empty_folder_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    vx.save(plain("test_resnet"), tmp_path / "out")
    vx.save(plain("test_vit", num_classes=7), tmp_path / "out")
    assert loaded(tmp_path / "out").num_classes == 7
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


# Refusals: each leaves nothing behind


@pytest.fixture
def nothing(tmp_path: Path) -> Any:
    yield tmp_path / "out"
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_image_size_is_named_and_what_is_named_works(tmp_path: Path) -> None:
    student = forgetful(timm.create_model("deit_tiny_patch16_224", num_classes=10, img_size=64))
    with pytest.raises(ModelError) as caught:
        vx.save(student, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    message = str(caught.value)
    assert "of pos_embed, the student's is (1, 17, 192) and timm's is (1, 197, 192)" in message
    assert 'This would work: save(model, path, options={"img_size": 64})' in message
    vx.save(student, tmp_path / "out", options={"img_size": 64})


def test_other_forgotten_options(nothing: Path) -> None:
    with pytest.raises(
        ModelError, match=r"of \S+, the student's is .* Give the options that it was made with"
    ):
        vx.save(forgetful(trained("mixer_nano_32", steps=0)), nothing)


def test_an_option_that_adds_a_weight(nothing: Path) -> None:
    student = vx.trace(plain("test_vit", global_pool="avg"))
    with pytest.raises(
        ModelError, match=r"of \S+, the student's is (none and timm's is \(|\(.* and timm's is none)"
    ):
        vx.save(student, nothing, options={"global_pool": "token", "img_size": 160})


def test_a_forgotten_option_that_changes_no_weight(nothing: Path) -> None:
    """Behind the fresh head of a mixer, all zero, only random weights show it."""
    student = plain("mixer_nano_32", act_layer=nn.ReLU)
    assert not bool(logits(student).any())
    with pytest.raises(
        VerificationError, match=r"has the student's weights and computes something else, by up"
    ):
        vx.save(forgetful(student), nothing, options=STUDENTS["mixer_nano_32"])


def test_a_wrong_pooling(nothing: Path) -> None:
    with pytest.raises(VerificationError, match=r"'global_pool': 'max'.*computes something else"):
        vx.save(plain("test_resnet"), nothing, options={"global_pool": "max"})


def test_the_pooling_that_was_given_is_kept(tmp_path: Path) -> None:
    model = plain("test_resnet", global_pool="max")
    assert torch.equal(logits(loaded(vx.save(vx.trace(model), tmp_path / "out"))), logits(model))


def test_an_option_that_is_no_text(nothing: Path) -> None:
    with pytest.raises(ModelError, match=r"act_layer=<class .*ReLU'>, which config.json cannot hold"):
        vx.save(plain("test_vit", act_layer=nn.ReLU), nothing)


def test_it_may_be_given_in_words(tmp_path: Path) -> None:
    model = plain("test_vit", act_layer=nn.ReLU)
    back = loaded(vx.save(model, tmp_path / "out", options={"act_layer": "relu"}))
    assert torch.equal(logits(back), logits(model))


def test_an_option_that_timm_does_not_take(nothing: Path) -> None:
    with pytest.raises(RecipeError, match=r"timm cannot create 'test_vit' with options .*img_sise"):
        vx.save(plain("test_vit"), nothing, options={"img_sise": 64})


@pytest.mark.slow
def test_an_image_size_that_shows_in_no_weight(tmp_path: Path) -> None:
    options = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, img_size=56, **options)
    with pytest.raises(ModelError) as caught:
        vx.save(forgetful(model), tmp_path / "out", options=options)
    assert list(tmp_path.iterdir()) == []
    assert "takes images of (3, 56, 56) and timm's of (3, 224, 224)" in str(caught.value)
    assert 'This would work: save(model, path, options={"img_size": 56})' in str(caught.value)
    folder = vx.save(vx.trace(model), tmp_path / "out")
    x = images(2, size=56)
    with torch.no_grad():
        assert torch.equal(loaded(folder).eval()(x), model.eval()(x))


@pytest.mark.parametrize("model", [small("mixer"), renamed(small("mixer"))], ids=["class", "renamed"])
def test_no_architecture_of_timm(model: nn.Module, nothing: Path) -> None:
    with pytest.raises(ModelError, match=r"(MlpMixer|X) is no architecture of timm"):
        vx.save(model, nothing)


def test_the_wrapper_of_averaged_weights(tmp_path: Path) -> None:
    model = plain("test_resnet")
    assert torch.equal(logits(loaded(vx.save(ModelEmaV3(model), tmp_path / "out"))), logits(model))


def test_a_lowered_student(nothing: Path) -> None:
    with pytest.raises(ModelError, match="test_resnet has been lowered"):
        vx.save(vx.lower(plain("test_resnet")), nothing)


def test_a_student_that_predicts_with_what_training_added(nothing: Path) -> None:
    student = vx.strip(trained("mixer_nano_32", steps=0), predict="dist")
    with pytest.raises(ModelError, match="predicts with what training added; save the task"):
        vx.save(student, nothing, options=STUDENTS["mixer_nano_32"])


def test_a_student_that_ran_away(nothing: Path) -> None:
    model = plain("test_resnet")
    nn.init.constant_(model.fc.weight, float("nan"))
    with pytest.raises(VerificationError, match="no finite numbers"):
        vx.save(model, nothing)


def test_too_few_labels(nothing: Path) -> None:
    with pytest.raises(ModelError, match="test_resnet knows 10 classes, and 2 labels were given"):
        vx.save(plain("test_resnet"), nothing, labels=("cat", "dog"))


def test_weights_that_change_on_the_way(nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flawed(path: Path, module: nn.Module, **about: Any) -> None:
        nn.init.normal_(module.fc.bias)
        save_weights(path, module, **about)
        nn.init.zeros_(module.fc.bias)

    monkeypatch.setattr(module_under_test, "save_weights", flawed)
    with pytest.raises(VerificationError, match=r"timm changes fc.bias while it loads the weights"):
        vx.save(plain("test_resnet"), nothing)


def test_a_full_disk_leaves_the_former_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vx.save(plain("test_resnet"), tmp_path / "out")
    before = {item.name: item.read_bytes() for item in (tmp_path / "out").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module_under_test, "save_config_for_hf", full)
    with pytest.raises(OutputError, match="No space left on device"):
        vx.save(plain("test_vit"), tmp_path / "out")
    assert {item.name: item.read_bytes() for item in (tmp_path / "out").iterdir()} == before
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes.txt and is no student saved before"):
        vx.save(plain("test_resnet"), tmp_path)
    with pytest.raises(OutputError, match="it is a file; give a folder"):
        vx.save(plain("test_resnet"), tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_model_folder_of_someone_else(tmp_path: Path) -> None:
    timm.models.save_for_hf(plain("test_resnet"), str(tmp_path / "theirs"), safe_serialization=True)
    with pytest.raises(OutputError, match="is no student saved before"):
        vx.save(plain("test_resnet"), tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(OutputError, match="is no student saved before"):
        vx.save(plain("test_resnet"), tmp_path / "theirs")


def test_a_saved_student_with_something_beside_it(tmp_path: Path) -> None:
    folder = vx.save(plain("test_resnet"), tmp_path / "out")
    (folder / "README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"cannot replace the student in .*: it also holds README.md"):
        vx.save(plain("test_resnet"), folder)
    assert (folder / "README.md").exists()
