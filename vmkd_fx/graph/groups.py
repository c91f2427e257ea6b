"""Groups of parameters for an optimiser: how deep each stands, and which ones shrink no weights.

timm asks a model twice: `no_weight_decay()` names what weight decay leaves alone beside one-dimensional
parameters, and `group_matcher()` sorts names by depth for layer-wise decay of the learning rate. A graph has
no class of its own to ask, so the answers are read when a model is traced and kept with the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from vmkd_fx.graph.receipt import PREFIX

_OF_LAYERS = ("weight", "bias")


@dataclass(frozen=True)
class Depths:
    """What a model says about its parameters.

    Attributes:
        layers: name of each parameter to its layer, from 0 at the images.
        kept: names, or patterns as the shell matches them, that weight decay leaves alone.
    """

    layers: dict[str, int] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()

    def layer_of(self, name: str) -> int:
        """The layer of any parameter.

        What training adds under the reserved prefix belongs to the last one, as heads do. What stands inside
        the student and was not there when it was traced belongs to the layer of its nearest neighbour by
        path.
        """
        if name in self.layers:
            return self.layers[name]
        path = name
        while not name.startswith(f"{PREFIX}.") and "." in path:
            path = path.rpartition(".")[0]
            near = [layer for known, layer in self.layers.items() if known.startswith(f"{path}.")]
            if near:
                return max(near)
        return max(self.layers.values(), default=0)

    def left_alone(self, names: Iterable[str]) -> set[str]:
        """Which of these parameters weight decay leaves alone.

        That is what the model named, and of what was added all that is no layer's weight or bias: tokens and
        embeddings, as timm's own models do it.
        """
        added = (name for name in names if name not in self.layers)
        return set(self.kept) | {name for name in added if name.rpartition(".")[2] not in _OF_LAYERS}


def depths(model: nn.Module) -> Depths:
    """Ask a model; where it says nothing, timm's own guess by the order of its parameters is taken."""
    from timm.models import group_parameters
    from timm.optim._param_groups import auto_group_layers

    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        layers = auto_group_layers(model)
    else:
        layers = group_parameters(model, matcher(coarse=False), reverse=True)
    kept: Iterable[str] = getattr(model, "no_weight_decay", tuple)()
    return Depths({str(name): int(layer) for name, layer in layers.items()}, frozenset(kept))
