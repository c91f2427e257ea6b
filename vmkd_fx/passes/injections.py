"""Every edit that a method may make to a student, by name, so that a trained student can be built again from
what its weights file says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from vmkd_fx.errors import UnknownNameError
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.traced import TracedModule, editing
from vmkd_fx.passes import (
    affine_mixer,
    bias_heads,
    bias_tokens,
    circulant_mixer,
    feature_taps,
    hints,
    imitation,
    std_tokens,
    two_heads,
    vitkd,
)
from vmkd_fx.passes.affine_mixer import AffineConfig, inject_affine_mixers
from vmkd_fx.passes.bias_heads import BiasHeadConfig, inject_bias_heads
from vmkd_fx.passes.bias_tokens import BiasTokenConfig, add_bias_tokens
from vmkd_fx.passes.circulant_mixer import CirculantConfig, inject_circulant_mixers
from vmkd_fx.passes.feature_taps import TapConfig, inject_feature_taps
from vmkd_fx.passes.hints import FitNetConfig, MgdConfig, inject_fitnet, inject_mgd
from vmkd_fx.passes.imitation import ImitationConfig, inject_imitation
from vmkd_fx.passes.std_tokens import StdConfig, inject_std_tokens
from vmkd_fx.passes.two_heads import TwoHeadsConfig, inject_two_heads
from vmkd_fx.passes.vitkd import VitKdConfig, inject_vitkd

Inject = Callable[[TracedModule, Any, Anatomy | None], TracedModule]

INJECTIONS: dict[str, tuple[type, Inject]] = {
    circulant_mixer.NAME: (CirculantConfig, inject_circulant_mixers),
    bias_tokens.NAME: (BiasTokenConfig, add_bias_tokens),
    affine_mixer.NAME: (AffineConfig, inject_affine_mixers),
    std_tokens.NAME: (StdConfig, inject_std_tokens),
    feature_taps.NAME: (TapConfig, inject_feature_taps),
    vitkd.NAME: (VitKdConfig, inject_vitkd),
    hints.FITNET: (FitNetConfig, inject_fitnet),
    hints.MGD: (MgdConfig, inject_mgd),
    two_heads.NAME: (TwoHeadsConfig, inject_two_heads),
    bias_heads.HEADS: (BiasHeadConfig, inject_bias_heads),
    imitation.NAME: (ImitationConfig, inject_imitation),
}
"""The settings of each edit, and the pass that makes it."""


@dataclass(frozen=True)
class Injected:
    """One edit: the name of a pass in `INJECTIONS` and its settings."""

    name: str
    config: Any

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return {"name": self.name, "config": asdict(self.config)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Injected:
        """The inverse of `to_json`.

        Raises:
            UnknownNameError: there is no such pass.
            TypeError: its settings are others.
        """
        if data["name"] not in INJECTIONS:
            raise UnknownNameError("injection", str(data["name"]), INJECTIONS)
        kind, _ = INJECTIONS[data["name"]]
        return cls(data["name"], kind(**{key: _tuples(value) for key, value in data["config"].items()}))


def edits_of(module: TracedModule) -> list[Injected]:
    """The edits that made a student what it is, in their order."""
    made = [*module.meta.get("replacements", ()), *module.receipts]
    return [Injected.from_json({"name": edit.name, "config": edit.config}) for edit in made]


def inject(module: TracedModule, edits: Iterable[Injected], known: Anatomy | None = None) -> TracedModule:
    """Make the edits in their order. `known` is the module's anatomy, where it is at hand and stays right."""
    with editing():
        for edit in (made := list(edits)):
            _, apply = INJECTIONS[edit.name]
            module = apply(module, edit.config, known)
    if made:
        module.recompile()
    return module


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
