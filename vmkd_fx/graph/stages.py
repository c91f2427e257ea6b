"""Which blocks make a stage, and what leaves it."""

from __future__ import annotations

from torch.fx import Node

from vmkd_fx.graph.blocks import Site
from vmkd_fx.graph.joins import DataFlow
from vmkd_fx.graph.layout import CHANNEL_AXIS, location_count
from vmkd_fx.graph.parts import Block, Stage
from vmkd_fx.graph.shapes import Shape
from vmkd_fx.graph.traced import TracedModule


def find_stages(
    module: TracedModule, flow: DataFlow, sites: list[Site], blocks: tuple[Block, ...], logits: Node
) -> tuple[Stage, ...]:
    """Runs of blocks with equally many tokens; where several streams run side by side, of one container."""
    main_line = set(flow.cuts(logits))
    stages = []
    for members in _runs(sites, blocks, main_line):
        (first, _), (last, block) = members[0], members[-1]
        others = [site.path for i, site in enumerate(sites) if not first <= i <= last]
        path, output = _leaves(module, flow, sites[last], block, others, main_line)
        shape = flow.shapes[output]
        layout = _layout_after(shape, block) or ("NLC" if len(shape) == 3 else "NCHW")
        count = location_count(shape, layout)
        prefix = block.prefix_tokens if layout == "NLC" and count > block.tokens else 0
        stages.append(
            Stage(path, first, last, output.name, layout, shape[CHANNEL_AXIS[layout]], count - prefix, prefix)
        )
    return tuple(stages)


def _runs(
    sites: list[Site], blocks: tuple[Block, ...], main_line: set[Node]
) -> list[list[tuple[int, Block]]]:
    """Neighbours of one stage: on the main line those with equally many tokens; beside it those of one
    container, or of one series with equally many tokens.
    """
    runs: list[list[tuple[int, Block]]] = []
    for index, block in enumerate(blocks):
        site, before = sites[index], sites[index - 1]
        alike = bool(runs) and block.tokens == blocks[index - 1].tokens
        if not runs:
            together = False
        elif site.output in main_line and before.output in main_line:
            together = alike
        else:
            same = _container(site.path) == _container(before.path)
            together = same or (alike and site.series == before.series)
        if together:
            runs[-1].append((index, block))
        else:
            runs.append([(index, block)])
    return runs


def _container(path: str) -> str:
    """The outermost module around a block whose name ends in a digit, else the outermost module."""
    parts = path.split(".")
    last = next((i for i, part in enumerate(parts) if part[-1:].isdigit()), 0)
    return ".".join(parts[: last + 1])


def _leaves(
    module: TracedModule, flow: DataFlow, site: Site, block: Block, others: list[str], main_line: set[Node]
) -> tuple[str, Node]:
    """The outermost module around a block that holds no block of another stage, and what leaves it: as many
    tokens, where the block stands on the main line.
    """
    nodes = {node.name: node for node in flow.order}
    best = site.path, site.output
    path = site.path
    while "." in path:
        path = path.rpartition(".")[0]
        if any(other.startswith(f"{path}.") for other in others):
            break
        for call in module.calls.get(path, []):
            output = nodes.get(call.outputs[0]) if len(call.outputs) == 1 else None
            if output not in main_line or flow.order[output] < flow.order[site.output]:
                continue
            shape = flow.shapes.get(output, ())
            beside = site.output not in main_line and len(shape) in (3, 4)
            if beside or _layout_after(shape, block) is not None:
                best = path, output
    return best


def _layout_after(shape: Shape, block: Block) -> str | None:
    """The layout in which a tensor holds as many tokens as a block leaves; None where there is none."""
    layouts = {3: ("NLC",), 4: ("NCHW", "NHWC")}.get(len(shape), ())
    for layout in sorted(layouts, key=lambda name: name != block.layout):
        if location_count(shape, layout) in (block.tokens, block.tokens + block.prefix_tokens):
            return layout
    return None
