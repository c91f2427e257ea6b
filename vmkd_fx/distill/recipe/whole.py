"""A recipe as a whole."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import Field, field_validator, model_validator

from vmkd_fx.distill.recipe.data import DataConfig, as_data
from vmkd_fx.distill.recipe.method import MethodConfig, as_list
from vmkd_fx.distill.recipe.models import ModelConfig, TeacherConfig
from vmkd_fx.distill.recipe.section import Section
from vmkd_fx.distill.recipe.training import TrainConfig


class Recipe(Section):
    """One training, complete.

    `method` is a preset's name, several joined by "+", a mapping with the preset and changed options, or a
    list of these; absent or "none" it is training without distillation. `data` as a text is a folder.
    """

    student: ModelConfig
    teachers: tuple[TeacherConfig, ...] = Field(default=(), strict=False)
    method: tuple[MethodConfig, ...] = Field(default=(), strict=False)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    out: str = Field(description="folder for the log, checkpoints and weights")

    @field_validator("method", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return as_list(value)

    @field_validator("data", mode="before")
    @classmethod
    def _folder(cls, value: Any) -> Any:
        return as_data(value)

    @model_validator(mode="after")
    def _teachers_are_used(self) -> Recipe:
        if self.teachers and not self.method:
            raise ValueError(
                "teachers are given and no method that uses them; add a method or drop the teachers"
            )
        return self

    def decisive(self) -> dict[str, Any]:
        """What decides the result, as plain data: everything but `out` and the `manner` of each section."""
        excluded: dict[str, Any] = {"out": True, "teachers": {"__all__": set(TeacherConfig.manner)}}
        sections: dict[str, type[Section]] = {
            "student": ModelConfig,
            "data": DataConfig,
            "train": TrainConfig,
        }
        excluded |= {name: set(section.manner) for name, section in sections.items()}
        return self.model_dump(mode="json", exclude=excluded)

    def digest(self) -> str:
        """SHA-256 of what is decisive, in hexadecimal: trainings with one digest are one training."""
        content = json.dumps(self.decisive(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()
