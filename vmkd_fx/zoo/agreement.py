"""Does the anatomy agree with what timm knows about its own model?

timm lists features in `feature_info`: a module, its channels, and how much smaller than the images it is.
They agree when every such module leaves exactly that, when the anatomy has a block for each feature where
timm lists one a block, and otherwise when each stage of the anatomy has a size that timm lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import nn
from torch.fx import Node

from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.places import module_outputs
from vmkd_fx.graph.shapes import Shape
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.zoo.row import UNKNOWN

_MOST_PREFIX = 17
ROUNDING = 4
"""Locations that a long edge may lack to edge / reduction: stems differ in their padding."""


def features_of(model: nn.Module) -> list[dict[str, Any]]:
    """timm's list of features: module, num_chs and reduction of each; empty where there is none."""
    given: Any = getattr(model, "feature_info", None)
    items = getattr(given, "info", given)
    if not isinstance(items, (list, tuple)):
        return []
    return [dict(item) for item in items if {"module", "num_chs", "reduction"} <= set(item)]


def disagreement(model: nn.Module, module: TracedModule, shapes: Mapping[Node, Shape], known: Anatomy) -> str:
    """What differs between the anatomy and timm's list; empty where they agree."""
    features = features_of(model)
    if not features:
        return UNKNOWN
    size = module.info.need_input_size()
    outputs = module_outputs(module)
    grids = [_grid(feature, size) for feature in features]
    modules = {path for path, _ in model.named_modules()}
    for feature, grid in zip(features, grids, strict=True):
        if feature["module"] not in modules or not feature["module"]:
            continue  # timm names a module that its model does not have
        node = outputs.get(feature["module"])
        found = list(shapes.values()) if node is None else [shapes.get(node, ())]
        if not any(_is_feature(shape, feature["num_chs"], grid) for shape in found):
            return (
                f"timm's feature {feature['module']} has {feature['num_chs']} channels at "
                f"{grid[0]}x{grid[1]} and is {found[0][1:] if node is not None else 'nowhere'} here"
            )
    if _one_a_block(features, known):
        if len(features) != len(known.blocks):
            return f"timm lists {len(features)} blocks, the anatomy {len(known.blocks)}"
        for feature, block in zip(features, known.blocks, strict=True):
            if not block.path.endswith(feature["module"]) or block.channels != feature["num_chs"]:
                return f"timm's block {feature['module']} is {block.path} here, of {block.channels} channels"
    for stage in known.stages:
        if not any(_fits(stage.tokens, grid) for grid in grids):
            sizes = ", ".join(f"{h}x{w}" for h, w in dict.fromkeys(grids))
            return f"stage {stage.path} leaves {stage.tokens} tokens, and timm lists {sizes}"
    return ""


def _is_feature(shape: Shape, channels: int, grid: tuple[int, int]) -> bool:
    """Whether a tensor of this shape holds so many channels at these locations, in whatever layout."""
    if len(shape) == 3:
        return shape[2] == channels and any(_fits(shape[1] - prefix, grid) for prefix in range(_MOST_PREFIX))
    if len(shape) != 4:
        return False
    layouts = ((shape[1], shape[2] * shape[3]), (shape[3], shape[1] * shape[2]))
    return any(found == channels and _fits(tokens, grid) for found, tokens in layouts)


def _one_a_block(features: list[dict[str, Any]], known: Anatomy) -> bool:
    """Whether timm lists every block: one after another, all of one size."""
    names = [feature["module"] for feature in features]
    same = len({(feature["num_chs"], _whole(feature["reduction"])) for feature in features}) == 1
    counted = [name.rpartition(".")[2] for name in names] == [str(i) for i in range(len(names))]
    return same and counted and len(names) > 1


def _grid(feature: Mapping[str, Any], size: tuple[int, ...]) -> tuple[int, int]:
    reduction = feature["reduction"]
    down, across = reduction if isinstance(reduction, (tuple, list)) else (reduction, reduction)
    return -(-size[1] // down), -(-size[2] // across)


def _whole(reduction: Any) -> tuple[int, ...]:
    return tuple(reduction) if isinstance(reduction, (tuple, list)) else (reduction,)


def _fits(tokens: int, grid: tuple[int, int]) -> bool:
    edges = [range(edge - (ROUNDING if edge > 7 else 1), edge + 2) for edge in grid]
    return tokens == prod(grid) or any(tokens == h * w for h in edges[0] for w in edges[1])
