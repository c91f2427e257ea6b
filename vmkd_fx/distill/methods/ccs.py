"""CCS: circulant channel-specific mixers instead of token-mixing MLPs; a student of its own, with or without
teachers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vmkd_fx.distill.methods.base import Method
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.passes.circulant_mixer import NAME, CirculantConfig
from vmkd_fx.passes.injections import Injected


@dataclass(frozen=True)
class Ccs(Method):
    """The student's token-mixing MLPs become circulant mixers, which stay; the loss is another method's, or
    that of the labels.

    Attributes:
        groups: G, circulant matrices a block; it divides the channels.
        initialise: "random", or "project", the circulants nearest to the student's weights, for mixers of one
            Linear (ResMLP, gMLP).
    """

    groups: int = 8
    initialise: str = "random"

    paper: ClassVar[str] = "CCS, Yu et al., 2021"
    fits: ClassVar[str] = "token-mixing MLPs: Mixer, ResMLP, gMLP"

    def __post_init__(self) -> None:
        self._config()

    def _config(self) -> CirculantConfig:
        return CirculantConfig(groups=self.groups, initialise=self.initialise)

    def check_run(self, teachers: int, epochs: int | None) -> None:
        """It learns from whatever there is."""

    def changes(self, known: Anatomy) -> list[Injected]:
        return [Injected(NAME, self._config())]
