"""`save`: the trained student as a timm model in a folder, which no longer needs this package.

    config.json           architecture, options, classes, preprocessing: timm's own layout
    model.safetensors     the student's own state dict

`timm.create_model("local-dir:folder", pretrained=True)` makes the student again, and that is proved before
the folder appears.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from timm.models._input import get_model_input_config
from torch import nn

from vmkd_fx.distill.checkpoint import read_metadata, save_weights
from vmkd_fx.errors import CheckpointError, ModelError, OutputError, RecipeError, VerificationError
from vmkd_fx.files import appearing
from vmkd_fx.graph.info import ModelInfo
from vmkd_fx.graph.receipt import PREFIX
from vmkd_fx.graph.replace import replacements
from vmkd_fx.graph.shapes import class_count
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import logits_of, probe_images, randomise_
from vmkd_fx.models import register
from vmkd_fx.models.named import named_model
from vmkd_fx.passes.pipeline import strip

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

_ARCHITECTURE = "architecture"
_OF_THE_ARCHITECTURE = (
    _ARCHITECTURE,
    "num_classes",
    "min_input_size",
    "pool_size",
    "first_conv",
    "classifier",
)
"""What of timm's published configuration is true of a student too: not its weights' licence or paper."""


def save(
    model: Any,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] = (),
    options: dict[str, Any] | None = None,
) -> Path:
    """Write the student to a folder from which timm makes it again, whole or not at all.

    What training added is taken out. `timm.create_model("local-dir:folder", pretrained=True)` gives the same
    logits bit for bit, which is checked; for a model of this package, after `vmkd_fx.models.register()`.

    Args:
        model: a task, a traced module or a plain model of a timm architecture; it is left as it was.
        path: the folder. A student that was saved there before is replaced.
        labels: names of the classes, in the order of the logits.
        options: keyword arguments of `timm.create_model` that the student was made with, such as `img_size`,
            where timm did not make it itself; classes and input channels need not be named. Drop rates are
            not written, as timm does not write them.

    Returns:
        The folder.

    Raises:
        ModelError: the student is no timm model; timm makes one with other weights of those options; or there
            are not as many labels as classes.
        RecipeError: timm takes no such options.
        VerificationError: timm makes another function of those options.
        OutputError: there is something else at `path`, or it cannot be written.
    """
    path = Path(path).resolve()
    _refuse_foreign(path)
    student = strip(model, copy=True).cpu().eval()
    _refuse_no_timm_model(student)
    classes = class_count(student, student.info.need_input_size())
    if labels and len(labels) != classes:
        raise ModelError(f"{student.info.name} knows {classes} classes, and {len(labels)} labels were given")
    with torch.random.fork_rng(devices=()):
        built = _built_by_timm(student, classes, {**student.info.options, **(options or {})})
        with appearing(path) as folder:
            save_weights(folder / WEIGHTS, student, architecture=student.info.name)
            _write_config(built, student.info, labels, folder / CONFIG)
            _check_function(student, folder, path)
    return path


def _refuse_no_timm_model(student: TracedModule) -> None:
    name = student.info.name
    if changed := [made.name for made in replacements(student)]:
        raise ModelError(
            f"{name} is another model since {', '.join(changed)} replaced parts of it, and timm has no such "
            "model; deploy it, or keep its state dict: wrap makes the same student again"
        )
    register()
    if not timm.is_model(name):
        raise ModelError(
            f"{name} is no architecture of timm, so that timm could not make it again; "
            "torch.save(vmkd_fx.strip(model).state_dict(), path) keeps its weights"
        )
    if student.ledger.steps:
        raise ModelError(f"{name} has been lowered and is no timm model any more; save what was lowered")


def _built_by_timm(student: TracedModule, classes: int, options: dict[str, Any]) -> nn.Module:
    """The model that timm makes with these options, on the meta device, if it has the student's shapes."""
    name = student.info.name
    own = inspect.signature(timm.create_model).parameters  # where weights come from, not what they are for
    options = {key: value for key, value in options.items() if key not in own}
    options = {"num_classes": classes, "in_chans": student.info.need_input_size()[0], **options}
    _refuse_unwritable(name, options)
    built = _on_meta(name, options)
    if difference := _first_difference(student, built):
        raise ModelError(
            f"{name} with options {options} is another model: {difference}. {_advice(student, options)}"
        )
    return built


def _refuse_unwritable(name: str, options: dict[str, Any]) -> None:
    for key, value in options.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"{name} was made with {key}={value!r}, which {CONFIG} cannot hold; give it in words where "
                'the architecture takes them, as in options={"act_layer": "relu"}'
            ) from error


def _on_meta(name: str, options: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return named_model(name, options)


def _first_difference(student: TracedModule, built: nn.Module) -> str | None:
    own, made = (
        {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        for module in (student, built)
    )
    for key in {**own, **made}:
        if own.get(key) != made.get(key):
            found, expected = (shapes.get(key, "none") for shapes in (own, made))
            return f"of {key}, the student's is {found} and timm's is {expected}"
    images = get_model_input_config(built)
    if images["fixed_input_size"] and images["input_size"] != student.info.need_input_size():
        return f"the student takes images of {student.info.input_size} and timm's of {images['input_size']}"
    return None


def _advice(student: TracedModule, options: dict[str, Any]) -> str:
    """What to call instead: with the image size, if that is all that is missing."""
    if any(key.startswith(f"{PREFIX}.") for key in student.state_dict()):
        return "It predicts with what training added; save the task, or vmkd_fx.strip(task)"
    height, width = student.info.need_input_size()[1:]
    size = {"img_size": height if height == width else [height, width]}
    try:
        fits = _first_difference(student, _on_meta(student.info.name, {**options, **size})) is None
    except RecipeError:
        fits = False
    if fits:
        return f"This would work: save(model, path, options={json.dumps(size)})"
    return 'Give the options that it was made with, as in save(model, path, options={"img_size": 64})'


def _write_config(built: nn.Module, info: ModelInfo, labels: Sequence[str], path: Path) -> None:
    published: dict[str, Any] = getattr(built, "pretrained_cfg", {})
    size = info.need_input_size()
    built.pretrained_cfg = {  # type: ignore[assignment]
        **{key: published[key] for key in _OF_THE_ARCHITECTURE if key in published},
        "input_size": size,
    }
    images = {
        "input_size": size,
        "mean": info.mean,
        "std": info.std,
        "interpolation": info.interpolation,
        "crop_pct": info.crop_pct,
    }
    save_config_for_hf(built, str(path), {"label_names": list(labels)}, data_config=images)


def _check_function(student: TracedModule, folder: Path, path: Path) -> None:
    """timm's model of the folder computes what the student computes, with its weights and with random ones.

    Equal shapes do not prove equal functions, and a fresh head, all zero, hides any difference.
    """
    name = student.info.name
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval()
    student = deepcopy(student).float()
    images = probe_images(student)
    own = student.state_dict()
    if not bool(logits_of(student, images).isfinite().all()):
        raise VerificationError(f"{name} returns logits that are no finite numbers; it was not saved")
    if changed := [key for key, value in loaded.state_dict().items() if not torch.equal(value, own[key])]:
        raise VerificationError(f"{name}: timm changes {changed[0]} while it loads the weights; not saved")
    for state in (own, randomise_(deepcopy(student)).state_dict()):
        student.load_state_dict(state)
        loaded.load_state_dict(state)
        expected, found = logits_of(student, images), logits_of(loaded, images)
        if not torch.equal(expected, found):
            written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_args"]
            raise VerificationError(
                f"{name} as timm makes it with options {written} has the student's weights and computes "
                f"something else, by up to {float((expected - found).abs().max()):.3g} on random images; "
                f"nothing was written to {path}. Add the options that change no weight, "
                'as in options={"global_pool": "max"} or {"act_layer": "relu"}'
            )


def _refuse_foreign(path: Path) -> None:
    """Only nothing, an empty folder, or a saved student and nothing beside it may be replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"cannot save a student to {path}: it is a file; give a folder")
    found = {item.name for item in path.iterdir()}
    if not found:
        return
    try:
        ours = {CONFIG, WEIGHTS} <= found and _ARCHITECTURE in read_metadata(path / WEIGHTS)
    except CheckpointError:
        ours = False
    if not ours:
        raise OutputError(
            f"cannot save a student to {path}: the folder holds {_some(found)} and is no student saved "
            "before; give another folder"
        )
    if foreign := found - {CONFIG, WEIGHTS}:
        raise OutputError(f"cannot replace the student in {path}: it also holds {_some(foreign)}")


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
