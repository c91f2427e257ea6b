"""`anatomy`: the one translator between graphs, which speak of nodes, and methods, which speak of blocks and
mixers.

Blocks, stages, branches, layouts and token mixers are read from what the graph computes, never from class
names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.fx import Node

from vmkd_fx.graph.blocks import Site, find_blocks
from vmkd_fx.graph.edit import logits_node
from vmkd_fx.graph.joins import Arm, DataFlow, Join
from vmkd_fx.graph.judge import Judge
from vmkd_fx.graph.layout import (
    CHANNEL_AXIS,
    LOCATION_AXES,
    layout_of,
    leading_norm,
    location_count,
    moves_axes,
    prefix_tokens,
)
from vmkd_fx.graph.mixing import Mixing
from vmkd_fx.graph.parts import Anatomy, Block, Branch
from vmkd_fx.graph.shapes import Shape, node_shapes
from vmkd_fx.graph.stages import find_stages
from vmkd_fx.graph.trace import trace
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.trailing import split_trailing


def anatomy(model: Any) -> Anatomy:
    """Read blocks, stages, branches, layouts and token mixers from a model, a traced module or a training
    task.
    """
    module = trace(model)
    return read_anatomy(module, node_shapes(module))


def read_anatomy(module: TracedModule, shapes: Mapping[Node, Shape]) -> Anatomy:
    """`anatomy` of a graph whose shapes are known."""
    flow = DataFlow(module, shapes)
    logits = logits_node(module)
    found = find_blocks(module, flow, logits)
    left_out = found.left_out
    judge = Judge(module, flow)
    pairs: list[tuple[Site, Block]] = []
    for site in found.sites:
        if len(flow.shapes.get(site.output, ())) not in (3, 4):
            left_out[site.path] = (
                f"leaves {flow.shapes.get(site.output, 'several tensors')}, neither NLC nor NCHW"
            )
        elif _is_class_alone(block := _read_block(judge, flow, site), pairs):
            left_out[site.path] = "works on prefix tokens alone"
        elif any(_same_without_prefix(block, site, *pair) for pair in pairs):
            left_out[site.path] = "class attention behind the blocks"
        else:
            pairs.append((site, block))
    sites, blocks = [site for site, _ in pairs], tuple(block for _, block in pairs)
    return Anatomy(
        module.info.name,
        blocks,
        find_stages(module, flow, sites, blocks, logits),
        logits.name,
        0 if module.info.num_classes == 0 else flow.shapes[logits][-1],
        tuple(sorted(left_out.items())),
        _hidden_behind(module, flow, sites),
        _final(module, flow, sites, logits),
    )


def _is_class_alone(block: Block, pairs: list[tuple[Site, Block]]) -> bool:
    """Whether a block sees no patches, where those before it did."""
    patches = any(other.tokens > 1 for _, other in pairs)
    return block.tokens < 1 or (block.tokens == 1 and block.layout == "NLC" and patches)


def _same_without_prefix(block: Block, site: Site, earlier: Site, other: Block) -> bool:
    """Whether blocks of another series had the same patches before a class token came to them."""
    apart = site.series != earlier.series and block.layout == other.layout == "NLC"
    return apart and block.tokens == other.tokens and block.prefix_tokens > other.prefix_tokens == 0


def _read_block(judge: Judge, flow: DataFlow, site: Site) -> Block:
    shape = flow.shapes[site.output]
    sums = [join for join in site.joins if join.is_sum and len(flow.shapes.get(join.source, ())) in (3, 4)]
    if sums:
        layouts = [_join_layout(judge, flow, join) for join in sums]
        layout = _layout_after(flow, sums[-1].node, site.output, layouts[-1])
        read = zip(sums, layouts, strict=True)
        branches = [branch for join, of in read for branch in _read_join(judge, flow, join, of)]
    else:
        work = flow.between(site.input, site.output)
        layout = layout_of(judge.module, flow.shapes, site.output, work)
        branches = [_whole(judge, flow, site.input, site.output, work, layout)]
    prefix = prefix_tokens(flow, site.output) if layout == "NLC" else 0
    return Block(
        site.path,
        site.input.name,
        site.output.name,
        layout,
        shape[CHANNEL_AXIS[layout]],
        location_count(shape, layout) - prefix,
        prefix,
        tuple(branches),
    )


def _join_layout(judge: Judge, flow: DataFlow, join: Join) -> str:
    """The layout of the stream that a sum's work reads."""
    work = sorted(join.nodes, key=flow.order.__getitem__)
    return layout_of(judge.module, flow.shapes, join.source, work)


def _layout_after(flow: DataFlow, join: Node, output: Node, layout: str) -> str:
    """The layout of what leaves a block whose last join has `layout`: another after a permutation."""
    ranks = len(flow.shapes[join]), len(flow.shapes[output])
    if ranks[1] == 3:
        return "NLC"
    moved = sum(moves_axes(node) for node in flow.between(join, output)) % 2 == 1
    if ranks[0] == 3:
        return "NCHW" if moved else "NHWC"
    return {"NCHW": "NHWC", "NHWC": "NCHW"}[layout] if moved else layout


def _read_join(judge: Judge, flow: DataFlow, join: Join, layout: str) -> list[Branch]:
    working = [arm for arm in join.arms if not arm.is_shortcut]
    if join.is_residual:
        return [_branch(judge, flow, join, arm, layout, "identity") for arm in working]
    main = max(working, key=lambda arm: len(arm.nodes))
    return [_branch(judge, flow, join, main, layout, "projection")]


def _branch(judge: Judge, flow: DataFlow, join: Join, arm: Arm, layout: str, shortcut: str) -> Branch:
    norm = leading_norm(judge.module, join.source, arm.nodes)
    body = arm.nodes[arm.nodes.index(norm) + 1 :] if norm else arm.nodes
    mixing = judge(body, norm or join.source, LOCATION_AXES[layout])
    return Branch(
        join.source.name,
        arm.end.name,
        join.node.name,
        norm.name if norm else None,
        layout,
        tuple(node.name for node in body),
        mixing,
        shortcut,
        _work(judge.module, body, arm.end).name,
        _channels(flow, arm.end, layout),
    )


def _channels(flow: DataFlow, end: Node, layout: str) -> int:
    shape = flow.shapes.get(end, ())
    return shape[-1] if len(shape) == 3 else shape[CHANNEL_AXIS[layout]] if len(shape) == 4 else 0


def _work(module: TracedModule, body: Sequence[Node], end: Node) -> Node:
    """The end of a branch's work, before layer scale, drop path and dropout."""
    work, _ = split_trailing(module, body)
    return work[-1] if work else end


def _whole(
    judge: Judge, flow: DataFlow, entry: Node, output: Node, work: Iterable[Node], layout: str
) -> Branch:
    """All of a block's work as one branch."""
    nodes = tuple(work)
    if len(flow.shapes.get(entry, ())) == (3 if layout == "NLC" else 4):
        mixing = judge(nodes, entry, LOCATION_AXES[layout])
    else:
        mixing = Mixing(None, "the tensor that enters has another layout")
    names = tuple(node.name for node in nodes)
    end = _work(judge.module, nodes, output).name
    channels = _channels(flow, output, layout)
    return Branch(entry.name, output.name, output.name, None, layout, names, mixing, "none", end, channels)


def _final(module: TracedModule, flow: DataFlow, sites: list[Site], logits: Node) -> str:
    """The name of the norm of the same shape behind the last block, else of what that block leaves."""
    if not sites:
        return ""
    output = sites[-1].output
    norm = leading_norm(module, output, flow.between(output, logits))
    return (norm if norm and flow.shapes[norm] == flow.shapes[output] else output).name


def _hidden_behind(module: TracedModule, flow: DataFlow, sites: list[Site]) -> str:
    """The path of a closed module with parameters behind the last block; "" where there is none."""
    last = max((flow.order[site.output] for site in sites), default=0)
    closed = {part.path for part in module.closed}
    for node, index in flow.order.items():
        if index > last and node.op == "call_module" and node.target in closed:
            path = str(node.target)
            if next(module.get_submodule(path).parameters(), None) is not None:
                return path
    return ""
