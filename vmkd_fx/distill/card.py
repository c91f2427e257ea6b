"""The card of a trained student: everything that is needed to build it again around its weights.

It travels in the metadata of the weights file, so that `vmkd deploy` needs that one file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vmkd_fx.distill.checkpoint import load_state, load_weights, read_metadata, read_weights
from vmkd_fx.distill.data import ImageData
from vmkd_fx.distill.recipe import ModelConfig, Recipe
from vmkd_fx.errors import CheckpointError
from vmkd_fx.graph.info import model_info
from vmkd_fx.graph.trace import trace
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.models.named import named_model
from vmkd_fx.passes.injections import Injected, inject

KEY = "card"


@dataclass(frozen=True)
class Card:
    """What a student is and what it was trained on.

    Attributes:
        model, options: name and keyword arguments, as `named_model` takes them.
        edits: what its methods put into it, in order: the name of each pass and its settings.
        input_size, mean, std: of the images, (C, H, W) and one value a channel.
        labels: names of the classes, in the order of the logits; empty where nobody named them.
        data: the data set it was trained on, as `open_data` takes it; None where unknown.
        interpolation, crop_pct, crop_mode: of the evaluation transform, in timm's terms.
    """

    model: str
    options: dict[str, Any]
    edits: tuple[dict[str, Any], ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...]
    data: dict[str, Any] | None = None
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Card:
        """The inverse of `to_json`."""
        lists = ("edits", "input_size", "mean", "std", "labels")
        return cls(**{**data, **{name: tuple(data[name]) for name in lists}})

    def create(self) -> nn.Module:
        """The student with fresh weights."""
        return self.dress(create_model(ModelConfig(model=self.model, options=self.options)))

    def dress(self, model: nn.Module) -> nn.Module:
        """Note how its images are prepared where timm keeps that; returns the model."""
        config = dict(getattr(model, "pretrained_cfg", None) or {})
        names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        images = {name: getattr(self, name) for name in names}
        model.pretrained_cfg = {**config, **images}  # type: ignore[assignment]
        return model

    def inject(self, student: nn.Module) -> TracedModule:
        """The student as it was trained: traced, with what its methods put in."""
        return inject(trace(student), [Injected.from_json(edit) for edit in self.edits])


def make_card(recipe: Recipe, data: ImageData, edits: Iterable[Injected] = ()) -> Card:
    """The card of the student that `recipe` trains on `data`, after the `edits` of its methods."""
    return Card(
        model=recipe.student.model,
        options={"num_classes": data.num_classes, **recipe.student.options},
        edits=tuple(edit.to_json() for edit in edits),
        input_size=data.input_size,
        mean=data.mean,
        std=data.std,
        labels=data.labels,
        data=recipe.data.model_dump(mode="json"),
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        crop_mode=data.crop_mode,
    )


def card_for(model: str, options: dict[str, Any]) -> Card:
    """The card of a plain timm model, for weights by someone else: images as timm prepares them for it."""
    info = model_info(create_model(ModelConfig(model=model, options=options)))
    seen = (info.interpolation, info.crop_pct, info.crop_mode)
    return Card(model, options, (), info.need_input_size(), info.mean, info.std, (), None, *seen)


def create_model(config: ModelConfig) -> nn.Module:
    """The model of that name, see `named_model`, with the checkpoint loaded if one is named.

    Raises:
        UnknownNameError: timm has no such model, or a module no such factory.
        RecipeError: the model takes no such options, or a factory fails.
        ModelError: a factory returned something else than a module.
        CheckpointError: the checkpoint is of another model.
    """
    model = named_model(config.model, config.options)
    if config.checkpoint is not None:
        load_weights(model, config.checkpoint, drop_prefix=True)
        if (card := read_card(config.checkpoint)) is not None:
            card.dress(model)
    return model


def read_card(path: str | os.PathLike[str]) -> Card | None:
    """The card in a weights file; None in a file by someone else.

    Raises:
        CheckpointError: the file cannot be read, or its card is damaged.
    """
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return None
    data = read_metadata(path).get(KEY)
    try:
        return None if data is None else Card.from_json(data)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"the card in {path} is damaged: {error}") from error


def restore(path: str | os.PathLike[str], card: Card | None = None) -> tuple[TracedModule, Card]:
    """The student of a weights file as it was trained, distillation heads and all, and its card.

    Args:
        path: safetensors, or any file that timm's loader reads.
        card: for a file that has none.

    Raises:
        CheckpointError: the file has no card and none is given, or belongs to another model.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no weights file {path}")
    card = card or read_card(path)
    if card is None:
        raise CheckpointError(f"{path} does not say which model it belongs to; name it: --model NAME")
    module = card.inject(card.create())
    load_state(module, read_weights(path), str(path))
    return module, card
