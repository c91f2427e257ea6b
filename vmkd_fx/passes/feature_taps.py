"""Features as extra outputs, and out again: what feature distillation reads (ViTKD, FitNet, RIFormer).

A tap changes nothing but the graph's output (where a later operation writes over the feature, it leaves as a
copy), so the student's own function stays bit for bit as it is, and
there are no hooks: it works under DistributedDataParallel, torch.compile(fullgraph=True) and checkpointing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vmkd_fx.errors import MatchError, RecipeError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.edit import Injection, overwritten
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.places import find_places
from vmkd_fx.graph.shapes import node_shapes
from vmkd_fx.graph.trace import trace
from vmkd_fx.graph.traced import TracedModule, fork

NAME = "taps"


@dataclass(frozen=True)
class TapConfig:
    """Which features leave: (name, place) each, see `vmkd_fx.graph.places`.

    A place that stands for several values gives each the name that it was found under.
    """

    places: tuple[tuple[str, int | str], ...]

    def __post_init__(self) -> None:
        if not self.places:
            raise RecipeError("no place to tap was given; the last block's output is '-1'")
        names = [name for name, _ in self.places]
        if twice := [name for name in names if names.count(name) > 1]:
            raise RecipeError(f"two taps are called {twice[0]!r}; each needs a name of its own")


def tap(model: Any, places: Sequence[int | str] | Mapping[str, int | str]) -> TracedModule:
    """Let features leave through the model's output: `gm(images)["taps/<name>"]`.

    Args:
        model: a model, a traced module or a task; it is left as it was.
        places: blocks, stages, branches, norms, modules or nodes, see `vmkd_fx.graph.places`; a mapping gives
            them names.

    Returns:
        A graph over the same parameters with outputs `logits` and `taps/<name>`, each in its own layout.

    Raises:
        MatchError: the model has no such block, stage, branch or norm.
        UnknownNameError: it has no such module and no such node; the error names the nearest.
    """
    named = places.items() if isinstance(places, Mapping) else [(str(place), place) for place in places]
    return inject_feature_taps(trace(model), TapConfig(tuple(named)))


def inject_feature_taps(
    module: TracedModule, config: TapConfig, known: Anatomy | None = None
) -> TracedModule:
    """Add the outputs; `strip` takes them out. `known` is the module's anatomy, where it is at hand."""
    known = known or anatomy(module)
    module = fork(module, to_edit=True)
    shapes = node_shapes(module)
    injection = Injection(module, NAME, asdict(config))
    for name, where in config.places:
        found = find_places(module, known, where)
        for place in found:
            if place.node not in shapes:
                raise MatchError(
                    f"{place.name!r} of {known.model} holds no single tensor; tap a module inside it"
                )
            node = place.node
            if overwritten(node, module):
                node = injection.keep(node)
            injection.emit(name if len(found) == 1 and not _is_pattern(where) else place.name, node)
    return injection.finish()


def _is_pattern(where: int | str) -> bool:
    return any(mark in str(where) for mark in "*?[")
