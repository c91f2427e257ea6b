"""The sections `student` and `teachers`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, JsonValue, model_validator

from vmkd_fx.distill.recipe.section import Section


class ModelConfig(Section):
    """A timm model: its name, keyword arguments for `timm.create_model`, and weights."""

    model: str = Field(description="timm's name of the model")
    options: dict[str, JsonValue] = Field(default={}, description="keyword arguments for timm.create_model")
    checkpoint: str | None = Field(
        default=None, description="weights: .safetensors, or a timm or torch file; none: as created"
    )


class TeacherConfig(ModelConfig):
    """A teacher: a model, and how it is run; or a cache of what it said, see `vmkd cache`."""

    manner: ClassVar[frozenset[str]] = frozenset({"device", "compile"})

    model: str = Field(
        default="", description="timm's name of the model; may be left out where there is a cache"
    )
    cache: str | None = Field(
        default=None,
        description="folder of its outputs, from `vmkd cache`: the teacher does not run; where `model` is "
        "given too, the cache must be of that model with these weights",
    )
    classes: str | list[int] | None = Field(
        default=None,
        description="its class of each of the student's classes, in their order: numbers, a file with a "
        "number or a WordNet identifier a line, or `labels` where the student's classes are named by such; "
        "-1: none; left out: the same classes",
    )
    device: str | None = Field(default=None, description="where it runs, as cuda:1; none: with the student")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None, description="the precision it runs in, without autocast; none: the training's"
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        description="height and width that images are resized to for it; none: not resized",
    )
    compile: bool = Field(default=False, description="run it through torch.compile")

    @model_validator(mode="after")
    def _is_something(self) -> TeacherConfig:
        if not self.model and self.cache is None:
            raise ValueError("name a model, or the cache of one: {model: resnet50} or {cache: folder}")
        changed = {
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default
        }
        if not self.model and (idle := sorted(changed - {"cache"})):
            raise ValueError(
                f"{', '.join(idle)} would change nothing: a cache without a model is taken as it is; leave "
                "that out, or name the model that the cache must be of"
            )
        return self
