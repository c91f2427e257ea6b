"""`vmkd demo`: the whole way on the handwritten digits, from three trainings to a bundle with an engine.

A teacher learns from a thousand labelled digits, a student from sixty: alone, and with STD from that teacher,
same seed, same steps. Sixty labels are too few for a Mixer and the teacher knows more, so there is something
to be taught. The teacher teaches by its soft predictions: on the few images that the student sees, its
decisions are the labels over again.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmkd_fx.deploy.bundle import Bundle, read_bundle
from vmkd_fx.deploy.pipeline import deploy
from vmkd_fx.deploy.runtime import load
from vmkd_fx.distill.card import restore
from vmkd_fx.distill.data import ImageData, open_data
from vmkd_fx.distill.evaluate import evaluator
from vmkd_fx.distill.recipe import Recipe
from vmkd_fx.distill.run_folder import TrainResult
from vmkd_fx.distill.train import train
from vmkd_fx.files import write_text
from vmkd_fx.passes.pipeline import strip
from vmkd_fx.steps import Ledger
from vmkd_fx.table import in_millions, table

Row = tuple[str, str | None, str]

TARGET = "tensorrt-rtx:sm86,sm89,sm120"
_IMAGES = {"name": "digits", "image_size": 16}
_TEACHER = "test_resnet"
_STUDENT: dict[str, Any] = {"model": "mixer_nano_32", "options": {"img_size": 16}}


def demo(out: Path, seed: int = 0) -> Path:
    """Run the demonstration into the folder `out` and print what came of it; returns the bundle.

    Started again, it goes on where it was stopped and ends with the same numbers.
    """
    started = time.monotonic()
    torch.set_num_threads(
        1
    )  # nets this small gain nothing from a second thread, and one is the same everywhere
    recipes = demo_recipes(out, seed)
    results = {}
    for index, (name, recipe) in enumerate(recipes.items(), start=1):
        print(f"{index}/5 {name}: {recipe.student.model}, {recipe.data.labelled} labelled digits", flush=True)
        results[name] = train(recipe)
    print("4/5 strip, merge, verify, export, build", flush=True)
    student, card = restore(results["distilled"].weights)
    scores = evaluator(card)
    bundle = read_bundle(deploy(student, out / "bundle", target=TARGET, labels=card.labels, evaluate=scores))
    print("5/5 the bundle on the held-out digits", flush=True)
    data = open_data(**recipes["distilled"].data.model_dump())
    print(f"\n{bundle.manifest.ledger}\n")
    text = _summary(results, bundle, data, strip(student).eval())
    write_text(out / "summary.txt", text + "\n")
    print(f"{text}\n\n{time.monotonic() - started:.0f} s in all")
    return bundle.path


def demo_recipes(out: Path, seed: int) -> dict[str, Recipe]:
    """The three trainings; the second and the third differ in their method alone."""
    common = {"lr": 2e-3, "batch_size": 30, "evaluate_every": 1000, "checkpoint_every": 20, "seed": seed}
    many, few = ({**_IMAGES, "labelled": labelled} for labelled in (1000, 60))
    student = {
        "student": _STUDENT,
        "data": few,
        "train": {**common, "epochs": 150, "warmup_epochs": 5},
    }
    teacher_weights = str(out / "teacher" / "last.safetensors")
    content: dict[str, dict[str, Any]] = {
        "teacher": {
            "student": {"model": _TEACHER},
            "data": many,
            "train": {**common, "epochs": 12, "warmup_epochs": 2},
        },
        "alone": student,
        "distilled": {
            **student,
            "teachers": [{"model": _TEACHER, "checkpoint": teacher_weights}],
            "method": {"preset": "std", "distillation": "soft", "temperature": 2.0},
        },
    }
    return {name: Recipe.model_validate({**c, "out": str(out / name)}) for name, c in content.items()}


def _summary(results: dict[str, TrainResult], bundle: Bundle, data: ImageData, plain: nn.Module) -> str:
    """The closing table and one line on whether the teacher helped."""
    ledger = bundle.manifest.ledger
    rows = [*_accuracies(results, ledger), _in_onnx_runtime(bundle, data, plain), *_costs(ledger)]
    rows += [
        ("size", f"{entry.bytes / 2**20:.2f} MiB", str(bundle.path / name))
        for name, entry in bundle.manifest.files.items()
    ]
    rows += [("training", f"{result.steps} steps", str(result.weights)) for result in results.values()]
    return f"{table(('what', 'measured', 'of what, or where'), rows)}\n\n{_verdict(results, ledger)}"


def _accuracies(results: dict[str, TrainResult], ledger: Ledger) -> list[Row]:
    by_head = ledger.accuracy
    student = _STUDENT["model"]
    return [
        ("teacher", _percent(results["teacher"].accuracy), f"{_TEACHER}, 1000 labelled digits"),
        ("student alone", _percent(results["alone"].accuracy), f"{student}, 60 labelled digits"),
        ("student with STD, class head", _percent(by_head["class"]), "same seed, same steps; deployed"),
        ("student with STD, mean", _percent(by_head["mean"]), "class and distillation head averaged"),
        ("student with STD, dist head", _percent(by_head["dist"]), "distillation head alone"),
    ]


def _in_onnx_runtime(bundle: Bundle, data: ImageData, plain: nn.Module) -> Row:
    images, targets = data.held_out()
    decisions = load(bundle.path, device="cpu")(images).argmax(-1)
    with torch.no_grad():
        in_torch = torch.cat([plain(batch.images).argmax(-1) for batch in data.validation_batches()]).numpy()
    agreed = f"{(decisions == in_torch).sum()} of {len(targets)} decisions as in torch"
    return ("bundle in ONNX Runtime", _percent(float((decisions == targets).mean())), agreed)


def _costs(ledger: Ledger) -> list[Row]:
    steps = {step.name: step for step in ledger.steps}
    rows: list[Row] = [
        ("parameters in training", in_millions(steps["training graph"].parameters), "student, tokens, head"),
        ("parameters deployed", in_millions(steps["lowered"].parameters), "the plain student"),
    ]
    rows += [
        (f"error of {step.name}", f"{step.error:.1e}", f"{step.checked}, at most {step.tolerance}")
        for step in ledger.steps
        if step.error is not None
    ]
    return [*rows, ("engine", steps["engine"].checked, TARGET)]


def _verdict(results: dict[str, TrainResult], ledger: Ledger) -> str:
    """One line on whether the teacher helped, as measured; one held-out image is 0.13 points."""
    alone = results["alone"].accuracy
    gains = {name: 100 * (value - alone) for name, value in ledger.accuracy.items()}
    word = "helped" if max(gains.values()) > 0 else "did not help"
    points = ", ".join(f"{name} {gain:+.1f}" for name, gain in gains.items())
    return f"the teacher {word}: points over the student alone, by prediction: {points}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
