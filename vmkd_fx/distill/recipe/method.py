"""The section `method`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class MethodConfig(BaseModel):
    """A distillation method: a preset, and those of its options that are changed."""

    model_config = ConfigDict(extra="allow", frozen=True)

    preset: str = Field(description="name of the preset", strict=True)

    @property
    def overrides(self) -> dict[str, Any]:
        """The options that differ from the preset's."""
        return dict(self.model_extra or {})


def as_list(value: Any) -> list[Any]:
    """The methods that a recipe's value stands for, each a mapping; "none" and null are no method."""
    items = [] if value in ("none", None) else value if isinstance(value, (list, tuple)) else [value]
    return [part for item in items for part in _methods_in(item)]


def _methods_in(item: Any) -> list[Any]:
    """The methods that a text stands for; anything else is one, right or wrong."""
    return [{"preset": name.strip()} for name in item.split("+")] if isinstance(item, str) else [item]
