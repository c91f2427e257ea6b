"""A teacher and how it is run: its device, its precision, its image size, which of its classes count."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vmkd_fx.errors import ModelError, UnknownNameError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TeacherSpec:
    """What `wrap` may be given instead of a module or a name, for a teacher that runs in its own manner.

    Attributes:
        model: a module, or the name of a timm model whose published weights are loaded.
        classes: the teacher's class of each class of the student, -1 where it has none; None: the same.
        device: where it stays, whatever is done to the task; None: where it is, and it moves with the task.
        dtype: "float16" or "bfloat16": it runs in that precision, without autocast; None: as it is.
        image_size: height and width that images are resized to for it; None: the student's, or its own where
            it takes no other.
        compile: run it through torch.compile.
    """

    model: nn.Module | str
    classes: Sequence[int] | None = None
    device: str | None = None
    dtype: str | None = None
    image_size: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UnknownNameError("dtype", self.dtype, DTYPES, where="teacher")
        if self.device is not None:
            _check_device(self.device)

    def placed(self, model: nn.Module) -> nn.Module:
        """`model` where and as it shall run: itself, or a copy where that is another device or precision."""
        if self.device is None and self.dtype is None:
            return model
        own = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        device = torch.device(self.device) if self.device else own.device
        dtype = DTYPES[self.dtype] if self.dtype else own.dtype
        if (own.device, own.dtype) == (device, dtype):
            return model
        return copy.deepcopy(model).to(device=device, dtype=dtype)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"teacher: {name!r} is no device; write cpu, cuda or cuda:1 for example") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ModelError(f"teacher: device {name} was asked for, and torch finds {count} CUDA devices here")
