"""What a cache is of: which teacher, which images, which seed. Two caches are one if these are equal."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vmkd_fx.graph.receipt import PREFIX
from vmkd_fx.graph.share import unwrapped

if TYPE_CHECKING:
    from vmkd_fx.distill.data import ImageData
    from vmkd_fx.distill.recipe import Recipe
    from vmkd_fx.distill.teachers import Teacher

_PLACES = frozenset({"root"})
"""Keys of the data section that say where the images are, not which."""


def teacher_identity(teacher: Teacher) -> dict[str, Any]:
    """What decides a teacher's outputs for given images."""
    classes = None if teacher.classes is None else teacher.classes.tolist()
    return {
        "name": teacher.info.name,
        "weights": weights_digest(teacher.model),
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "image_size": list(teacher.resize or teacher.student_size[1:]),
        "mean": list(teacher.info.mean),
        "std": list(teacher.info.std),
        "classes": None if classes is None else digest_of(classes),
    }


def data_identity(recipe: Recipe, data: ImageData) -> dict[str, Any]:
    """What decides the images of every epoch: the seed, and the data section but where the images lie."""
    section = recipe.data.model_dump(mode="json", exclude={*recipe.data.manner, *_PLACES})
    return {
        "seed": recipe.train.seed,
        "data": section,
        "count": len(data),
        "labels": digest_of(list(data.labels)),
        "input_size": list(data.input_size),
        "mean": list(data.mean),
        "std": list(data.std),
    }


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers of a model under their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unwrapped(model).state_dict().items()):
        if name.startswith(f"{PREFIX}."):
            continue
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of plain data, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
