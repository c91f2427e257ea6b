"""What all sections of a recipe have in common.

A section is a file: `models` (student, teachers), `method`, `data`, `training`. A new key is a field of its
class with a description; the message for a wrong key, the schema for editors and the check of defaults follow
from it.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping with known keys; no value is converted to another kind, and none is infinite.

    Attributes:
        manner: keys that say how a training runs (workers, devices, how often it is logged) and change
            nothing of what comes out. They are no part of a recipe's digest: a training may go on with
            others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    manner: ClassVar[frozenset[str]] = frozenset()
