"""A recipe on digits with a teacher that is sure of itself, and what its live teacher says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch

from vmkd_fx.distill.checkpoint import save_weights
from vmkd_fx.distill.data import ImageData, open_data
from vmkd_fx.distill.recipe import Recipe
from vmkd_fx.distill.recipe_teachers import teacher_spec
from vmkd_fx.distill.teachers import Teacher
from vmkd_fx.graph.info import ModelInfo


def weights(path: Path, seed: int = 1, sure: float = 40) -> Path:
    """A checkpoint of test_resnet; its logits spread as those of a trained model do, the more the `sure`r."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=10)
    with torch.no_grad():
        model.fc.weight.mul_(sure)
    save_weights(path, model)
    return path


def recipe(folder: Path, **changes: Any) -> Recipe:
    """Three epochs of 90 digits; `changes` replace whole sections or, as mappings, keys of them."""
    checkpoint = folder / "teacher.safetensors"
    if not checkpoint.exists():
        weights(checkpoint)
    content: dict[str, Any] = {
        "student": {"model": "mixer_nano_32", "options": {"img_size": 16, "num_blocks": 1}},
        "teachers": [{"model": "test_resnet", "checkpoint": str(checkpoint)}],
        "method": "kd",
        "data": {"name": "digits", "labelled": 90, "image_size": 16},
        "train": {"epochs": 3, "batch_size": 30, "seed": 3},
        "out": str(folder / "run"),
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    return Recipe.model_validate(content)


def images_of(given: Recipe) -> ImageData:
    return open_data(**given.data.model_dump())


def live_teacher(given: Recipe, place: int = 0) -> Teacher:
    data = images_of(given)
    student = ModelInfo("", input_size=data.input_size, mean=data.mean, std=data.std)
    return Teacher(teacher_spec(given.teachers[place], data), student)
