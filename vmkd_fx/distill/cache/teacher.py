"""A teacher that is not there: its outputs come from a cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vmkd_fx.distill.cache.folder import CacheFolder
from vmkd_fx.distill.cache.form import SKETCH
from vmkd_fx.distill.cache.reader import CacheReader
from vmkd_fx.distill.cache.sketch import TOLERANCE, sketch
from vmkd_fx.distill.methods import Source, Wanted
from vmkd_fx.errors import CacheError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.edit import LOGITS
from vmkd_fx.graph.info import ModelInfo
from vmkd_fx.graph.trace import trace
from vmkd_fx.models.named import named_model


class CachedTeacher(nn.Module):
    """Stands where a `Teacher` would, and reads what that one said.

    Args:
        path: a teacher's cache, or the folder that `vmkd cache` wrote for all teachers of a recipe.
        place: which of these.

    Raises:
        CacheError: there is no cache, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], place: int = 0) -> None:
        super().__init__()
        self.folder = CacheFolder.open(path, place)
        self.reader = CacheReader(self.folder)
        manifest = self.folder.manifest
        self.info = ModelInfo(
            name=manifest.teacher["name"],
            num_classes=manifest.form.classes,
            mean=tuple(manifest.teacher["mean"]),
            std=tuple(manifest.teacher["std"]),
        )
        self.num_classes = manifest.form.classes
        self.rehearses = False
        self.wanted: dict[str, Wanted] = {}

    @property
    def model(self) -> nn.Module:
        """Stands for the teacher in what a method does before the first step; it has no weights to give."""
        return _Weightless(self.info.name, str(self.folder.path))

    def source(self, features: bool = False) -> Source:
        """What methods know of the teacher; with `features` its anatomy, read off a model without numbers.

        Raises:
            CacheError: the model cannot be made again, or the cache has no features.
        """
        manifest = self.folder.manifest
        height, width = manifest.teacher["image_size"]
        size = (manifest.images["input_size"][0], height, width)
        if not features:
            return Source(self.info.name, size)
        if not manifest.form.features:
            raise CacheError(
                f"{self.folder.path} holds logits alone, and the method reads features of {self.info.name}: "
                "write the cache with vmkd cache --features and this method in the recipe"
            )
        options = {**manifest.made["options"], "pretrained": False}
        with torch.device("meta"):
            model = named_model(manifest.made["model"], options)
        return Source(self.info.name, size, anatomy(trace(model.eval(), input_size=size)))

    def read(self, wanted: Mapping[str, Wanted]) -> None:
        """Say which features are read; the cache must have them as they are wanted.

        Raises:
            CacheError: it has not, and says which it has.
        """
        held = self.folder.manifest.form.features
        for name, one in wanted.items():
            if name not in held:
                raise CacheError(
                    f"{self.folder.path} holds no feature {name}, only {', '.join(held) or 'logits'}; write "
                    "a cache with --features and this method in the recipe"
                )
            if held[name].wanted != one:
                raise CacheError(
                    f"{self.folder.path} holds the feature {name} as {held[name].wanted}, and this student "
                    f"reads it as {one}; write a cache for it"
                )
        self.wanted = dict(wanted)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to compile."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CachedTeacher:
        return self

    @torch.no_grad()
    def forward(
        self, images: torch.Tensor, indices: torch.Tensor | None = None, epoch: int | None = None
    ) -> dict[str, torch.Tensor]:
        """What the teacher said about the samples `indices` (B,) of that epoch, which `images` show.

        Raises:
            CacheError: nobody said which samples or which epoch, the cache has no such rows, or an image is
                not the one that the teacher saw.
        """
        if self.rehearses:
            return self._nothing(images)
        if indices is None or epoch is None:
            raise CacheError(
                f"the outputs of {self.info.name} come from {self.folder.path}: call task.set_epoch(epoch) "
                "before each epoch and task(images, targets, indices) with the samples' numbers"
            )
        columns = self.reader.rows(epoch, indices.cpu().numpy())
        stored = torch.from_numpy(columns[SKETCH]).to(images.device)
        far = (sketch(images) - stored).abs() > TOLERANCE
        if bool(far.any()):
            wrong = indices[far.nonzero()[:, 0].to(indices.device)].tolist()
            raise CacheError(
                f"{len(wrong)} of {len(indices)} images of epoch {epoch}, sample {wrong[0]} first, are not "
                f"those that {self.info.name} saw for {self.folder.path}: the files of the data set, how "
                "they are augmented, or the version of torchvision or timm have changed; write the cache anew"
            )
        outputs = self.folder.manifest.form.decode(columns, images.device, _wide(images.dtype))
        return {name: value for name, value in outputs.items() if name == LOGITS or name in self.wanted}

    def _nothing(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs of the right shapes."""
        form = self.folder.manifest.form
        shapes = {LOGITS: (form.classes,), **{name: form.features[name].shape for name in self.wanted}}
        dtype = _wide(images.dtype)
        return {name: images.new_zeros(len(images), *shape, dtype=dtype) for name, shape in shapes.items()}


@contextmanager
def rehearsal(task: nn.Module) -> Iterator[None]:
    """In the block, what is cached in `task` answers any images with zeros of the right shapes: for estimates
    that need no real ones.
    """
    cached = [part for part in task.modules() if isinstance(part, CachedTeacher)]
    for teacher in cached:
        teacher.rehearses = True
    try:
        yield
    finally:
        for teacher in cached:
            teacher.rehearses = False


class _Weightless(nn.Module):
    """A model whose weights nobody has."""

    def __init__(self, name: str, cache: str) -> None:
        super().__init__()
        self.name, self.cache = name, cache

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise CacheError(
            f"{self.cache} holds what {self.name} said and not its weights, which the method starts from: "
            "set teacher_weights: false, or give the teacher itself"
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
