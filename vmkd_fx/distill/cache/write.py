"""`cache_teachers`: the outputs of a recipe's teachers about every image of every epoch, written once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vmkd_fx.distill.cache.folder import CacheFolder, Manifest
from vmkd_fx.distill.cache.form import INDEX, SKETCH, Columns, Feature, Form
from vmkd_fx.distill.cache.identity import data_identity, teacher_identity
from vmkd_fx.distill.cache.images import shards_of
from vmkd_fx.distill.cache.shards import read_shard, write_shard
from vmkd_fx.distill.cache.sketch import sketch
from vmkd_fx.distill.data import Batch, ImageData, open_data
from vmkd_fx.distill.methods import resolve
from vmkd_fx.distill.recipe import Recipe, TeacherConfig
from vmkd_fx.distill.recipe_teachers import teacher_spec
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.distill.teachers import Teacher, make_teachers
from vmkd_fx.distill.train import make_task
from vmkd_fx.errors import CacheError, RecipeError
from vmkd_fx.graph.edit import LOGITS
from vmkd_fx.graph.info import ModelInfo
from vmkd_fx.progress import progress as follow

TOP_K = 100
_MOST_ROWS = 8192
_MOST_BYTES = 32 << 20


@dataclass(frozen=True)
class CacheSettings:
    """What is kept, and how it is computed.

    Attributes:
        top_k: classes that are kept of each distribution, where that takes less than all; None: all.
        dtype: of what is kept, "float16" or "float32".
        features: keep the features that the recipe's methods read, too.
        epochs: which are written, from 0; None: all of the recipe.
        batch_size: images in one forward.
        check: read what is there already, and write it anew where it is damaged.
    """

    top_k: int | None = TOP_K
    dtype: str = "float16"
    features: bool = False
    epochs: range | None = None
    batch_size: int = 64
    check: bool = False


@dataclass(frozen=True)
class Share:
    """The part of the work that one process does.

    Attributes:
        device: where the teachers run that name none; None: where they are.
        rank, size: number of this process, from 0, and of all.
    """

    device: str | None = None
    rank: int = 0
    size: int = 1

    def of(self, work: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """A stretch of it; the stretches of all processes are the whole."""
        first, last = (len(work) * part // self.size for part in (self.rank, self.rank + 1))
        return work[first:last]


def cache_teachers(
    recipe: Recipe,
    out: str | os.PathLike[str],
    settings: CacheSettings | None = None,
    share: Share | None = None,
    progress: bool = True,
) -> list[CacheFolder]:
    """Write a cache for each teacher of `recipe` that is none yet: `out`/<place>-<name>.

    What is there stays; what is missing is added. A process that was killed left whole files or none, and
    goes on behind them. Several processes, at once or one after another, share the work out by `share`.

    Raises:
        CacheError: `out` holds caches of other teachers, images or settings; says what differs.
        RecipeError: the recipe has no teacher that runs, or a method reads features that are not kept.
        VmkdError: models, teachers, data and method do not fit together.
        OutputError: `out` cannot be written to, or the disk is full.
    """
    settings, share = settings or CacheSettings(), share or Share()
    epochs = settings.epochs if settings.epochs is not None else range(recipe.train.epochs)
    if not recipe.method or not any(config.cache is None for config in recipe.teachers):
        raise RecipeError("the recipe has no teacher that runs: name at least one, and a method that uses it")
    data = open_data(**recipe.data.model_dump())
    torch.manual_seed(recipe.train.seed)  # one teacher in all processes, also without a checkpoint
    live = _live(recipe, data, settings.features)
    writers = _writers(recipe, data, Path(out), live, settings, share)
    mine = share.of([(epoch, shard) for epoch in epochs for shard in range(writers[0].folder.shards)])
    lacking = frozenset().union(*(writer.look(mine) for writer in writers))
    todo = [one for one in mine if one in lacking]
    size = settings.batch_size
    images = sum(len(writers[0].folder.span(shard)) for _, shard in todo)
    with follow(images, "asking the teachers", show=progress and share.rank == 0) as bar:
        for epoch, shard, batches in shards_of(data, recipe.train.seed, writers[0].folder, todo, size):
            for batch in batches:
                for writer in writers:
                    writer.add(epoch, shard, batch)
                bar.update(len(batch.indices))
            for writer in writers:
                writer.close(epoch, shard)
    return [writer.folder for writer in writers]


class _Writer:
    """Fills the cache of one teacher."""

    def __init__(self, teacher: Teacher, folder: CacheFolder, check: bool) -> None:
        self.teacher, self.folder, self.check = teacher, folder, check
        self.lacking: frozenset[tuple[int, int]] = frozenset()
        self._parts: list[Columns] = []

    def _lacks(self, epoch: int, shard: int) -> bool:
        file = self.folder.file(epoch, shard)
        if not file.exists() or not self.check:
            return not file.exists()
        try:
            read_shard(file, self.folder.about(epoch, shard))
        except CacheError:
            file.unlink()
            return True
        return False

    def look(self, work: Iterable[tuple[int, int]]) -> frozenset[tuple[int, int]]:
        """Note which of these shards have to be written."""
        self.folder.tidy()
        self.lacking = frozenset(one for one in work if self._lacks(*one))
        return self.lacking

    def add(self, epoch: int, shard: int, batch: Batch) -> None:
        """Ask the teacher about a batch of the shard, unless the shard was there."""
        if (epoch, shard) not in self.lacking:
            return
        images = batch.images.to(self.teacher.scale.device)
        columns = self.folder.manifest.form.encode(self.teacher(images))
        columns[INDEX] = batch.indices.numpy().astype(np.int32)
        columns[SKETCH] = sketch(batch.images).numpy()
        self._parts.append(columns)

    def close(self, epoch: int, shard: int) -> None:
        """Write the shard."""
        if self._parts:
            joined = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
            write_shard(self.folder.file(epoch, shard), joined, self.folder.about(epoch, shard))
            self._parts = []


def _live(recipe: Recipe, data: ImageData, features: bool) -> list[tuple[int, TeacherConfig, Teacher]]:
    """The teachers that run, with their places in the recipe; with `features` tapped for its student."""
    configs = [(place, config) for place, config in enumerate(recipe.teachers) if config.cache is None]
    if features:
        task = make_task(recipe, data)
        assert isinstance(task, DistillationTask)
        return [(place, config, task.teachers[place]) for place, config in configs]  # type: ignore[misc]
    methods = [resolve(method.preset, method.overrides) for method in recipe.method]
    for place, config in configs:
        if reader := next((method.name for method in methods if method.feature_teacher == place), None):
            raise RecipeError(
                f"the method {reader} reads features of the teacher {config.model}, which are kept with "
                "--features (CacheSettings(features=True)) alone; for logits alone name another method"
            )
    student = ModelInfo("the student", input_size=data.input_size, mean=data.mean, std=data.std)
    specs = [teacher_spec(config, data) for _, config in configs]
    found = make_teachers(specs, student, data.num_classes)
    return [(*at, teacher) for at, teacher in zip(configs, found, strict=True)]  # type: ignore[misc]


def _writers(
    recipe: Recipe,
    data: ImageData,
    out: Path,
    live: Sequence[tuple[int, TeacherConfig, Teacher]],
    settings: CacheSettings,
    share: Share,
) -> list[_Writer]:
    identities = [teacher_identity(teacher) for _, _, teacher in live]
    for _, _, teacher in live:
        if share.device is not None:
            teacher.to(share.device)
    sample = torch.stack([data.sample(0, 0, recipe.train.seed)[0]])
    forms = [_form(teacher, sample, settings) for _, _, teacher in live]
    # One number for all teachers, so that one pass over the images fills every cache.
    rows = _rows(max(form.bytes_per_image for form in forms))
    images = data_identity(recipe, data)
    # Where neighbours are mixed, the last image of an odd number has none, and no batch reaches it.
    count = len(data) - len(data) % 2 if recipe.data.mixing else len(data)
    writers = []
    for (place, config, teacher), identity, form in zip(live, identities, forms, strict=True):
        made = {"model": config.model, "options": config.options, "checkpoint": config.checkpoint}
        manifest = Manifest(identity, images, made, count, rows, form)
        folder = CacheFolder.create(out / f"{place}-{teacher.info.name}", manifest)
        writers.append(_Writer(teacher, folder, settings.check))
    return writers


def _form(teacher: Teacher, image: Tensor, settings: CacheSettings) -> Form:
    """What of this teacher's outputs is kept."""
    found = teacher(image.to(teacher.scale.device))
    classes = found[LOGITS].shape[-1]
    features = {
        name: Feature(wanted, (found[name].shape[1], found[name].shape[2]))
        for name, wanted in teacher.wanted.items()
        if settings.features
    }
    whole = Form(classes, None, settings.dtype, features)
    if settings.top_k is None or settings.top_k >= classes:
        return whole
    short = Form(classes, settings.top_k, settings.dtype, features)
    return short if short.bytes_per_image < whole.bytes_per_image else whole


def _rows(bytes_per_image: int) -> int:
    """Rows of a shard: a power of two, so that batches of a power of two end where it ends."""
    return min(_MOST_ROWS, 1 << max(0, (_MOST_BYTES // bytes_per_image).bit_length() - 1))
