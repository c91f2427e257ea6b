"""Which modules are a model's blocks: the repeated ones around its joins.

A block is the smallest numbered module around a residual sum, or around a concatenation where a model has no
residual sums; modules of the same series (the path with other numbers) are blocks too, also where their
shortcut is missing. What looks like a block and is none is left out, with the reason.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from math import prod

from torch import nn
from torch.fx import Node

from vmkd_fx.graph.edit import owner
from vmkd_fx.graph.joins import DataFlow, Join
from vmkd_fx.graph.traced import TracedModule

SMALL = 0.05
"""A series whose blocks have less than this share of another's parameters stands beside the blocks."""


@dataclass
class Site:
    """Where a block is in the graph: its module, the nodes that enter and leave it, its outermost joins."""

    path: str
    input: Node
    output: Node
    joins: list[Join] = field(default_factory=list)

    @property
    def series(self) -> str:
        return _series(self.path)


@dataclass(frozen=True)
class Found:
    """The sites in order, and what was left out: paths and why."""

    sites: tuple[Site, ...]
    left_out: dict[str, str]


def find_blocks(module: TracedModule, flow: DataFlow, logits: Node) -> Found:
    """The blocks of a model, in graph order."""
    joins = [join for join in flow.joins() if join.is_residual or flow.is_closed(join)]
    by_path: dict[str, list[Join]] = defaultdict(list)
    for join in joins:
        if path := _block_path(join):
            by_path[path].append(join)
    by_path = {path: _outermost(found) for path, found in by_path.items()}
    left_out: dict[str, str] = {}
    for rule in (_without_shortcut, _around_blocks):
        dropped = rule(by_path)
        left_out.update(dropped)
        by_path = {path: found for path, found in by_path.items() if path not in dropped}
    by_path = _climb(module, by_path)
    calls = _calls(module, flow)
    sites = [site for path, found in by_path.items() for site in _sites(path, found, calls, flow)]
    sites += _same_series(module, sites, calls, flow)
    sites = _drop_stem(module, flow, sites, left_out)
    sites = _drop_small(module, sites, left_out)
    sites = sites or _numbered(module, calls, flow, logits) or _chain(module, flow, logits)
    sites.sort(key=lambda site: flow.order[site.output])
    return Found(tuple(sites), left_out)


def _series(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def _block_path(join: Join) -> str:
    """The deepest module with a number as its name around the join, else the module that holds the join."""
    path = owner(join.node) or _common_path(join)
    parts = path.split(".")
    while len(parts) > 1 and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts) if parts[-1].isdigit() else path


def _common_path(join: Join) -> str:
    """Where the arms' modules and parameters live, for a forward that does everything itself."""
    targets = [str(n.target).split(".") for n in join.nodes if n.op in ("call_module", "get_attr")]
    same = takewhile(lambda names: len(set(names)) == 1, zip(*targets, strict=False))
    return ".".join(names[0] for names in same)


def _outermost(joins: list[Join]) -> list[Join]:
    """Those that lie in no arm of another; without concatenations, where there are residual sums."""
    kept: list[Join] = []
    covered: set[Node] = set()
    for join in reversed(joins):
        if join.node not in covered:
            kept.append(join)
            covered |= join.nodes
    residual = any(join.is_residual for join in kept)
    return [join for join in kept[::-1] if join.is_sum or not residual]


def _without_shortcut(by_path: Mapping[str, list[Join]]) -> dict[str, str]:
    """Members of series that never have a residual sum, where another series has."""
    residual = {_series(path) for path, found in by_path.items() if any(join.is_residual for join in found)}
    reason = "joins without a shortcut beside residual blocks"
    return {path: reason for path in by_path if residual and _series(path) not in residual}


def _around_blocks(by_path: Mapping[str, list[Join]]) -> dict[str, str]:
    """Of nested candidates the one that is no block, and why.

    The outer one, unless a single join inside it belongs to its own work.
    """
    inner_of = {path: [other for other in by_path if other.startswith(f"{path}.")] for path in by_path}
    plain = {_series(path) for path, inner in inner_of.items() if not inner}
    dropped: dict[str, str] = {}
    for path, inner in inner_of.items():
        if not inner:
            continue
        covered = set().union(*(join.nodes for join in by_path[path]))
        own = all(join.node in covered for other in inner for join in by_path[other])
        wraps = own and (any(join.is_residual for join in by_path[path]) or _series(path) in plain)
        if len(inner) == 1 and wraps:
            dropped[inner[0]] = f"inside the block {path}"
        else:
            dropped[path] = "around other blocks"
    return dropped


def _climb(module: TracedModule, by_path: dict[str, list[Join]]) -> dict[str, list[Join]]:
    """Take the numbered parent where each in the series holds one block: it wraps a residual sum."""
    while True:
        parents: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for path in by_path:
            parents[_series(path)][path.rpartition(".")[0]].append(path)
        lifted = {
            path: parent
            for families in parents.values()
            if all(
                len(paths) == 1 and parent.rpartition(".")[2].isdigit() and _has_work_beside(module, paths[0])
                for parent, paths in families.items()
            )
            for parent, paths in families.items()
            for path in paths
        }
        if not lifted:
            return by_path
        by_path = {lifted.get(path, path): found for path, found in by_path.items()}


def _has_work_beside(module: TracedModule, path: str) -> bool:
    """Whether the parent of a module holds parameters outside it."""
    parent, _, name = path.rpartition(".")
    siblings = module.get_submodule(parent).named_children()
    return any(next(child.parameters(), None) is not None for other, child in siblings if other != name)


def _calls(module: TracedModule, flow: DataFlow) -> dict[str, list[tuple[Node, Node]]]:
    """For each opened module the tensors that enter and leave its calls.

    Of several that leave, the one computed last; of several that enter, the one most like it, or the first.
    """
    nodes = {node.name: node for node in flow.order}
    found: dict[str, list[tuple[Node, Node]]] = {}
    for path, calls in module.calls.items():
        for call in calls:
            inputs = [nodes[name] for name in call.inputs if name in nodes and nodes[name] in flow]
            outputs = [nodes[name] for name in call.outputs if name in nodes and nodes[name] in flow]
            if not inputs or not outputs:
                continue
            output = max(outputs, key=flow.order.__getitem__)
            shape = flow.shapes.get(output)
            entry = next((node for node in inputs if flow.shapes.get(node) == shape), inputs[0])
            found.setdefault(path, []).append((entry, output))
    return found


def _sites(
    path: str, joins: list[Join], calls: Mapping[str, list[tuple[Node, Node]]], flow: DataFlow
) -> list[Site]:
    """The sites of one module: one a call, or one a stream where a call carries several."""
    if pairs := calls.get(path, []):
        sites = []
        for entry, output in pairs:
            inside = [j for j in joins if flow.order[entry] < flow.order[j.node] <= flow.order[output]]
            if inside:
                sites.append(Site(path, entry, output, inside))
        if sites:
            return sites
    streams: list[list[Join]] = []
    for join in joins:
        stream = next((s for s in streams if join.source is s[-1].node or s[-1].node in join.nodes), None)
        if stream is None:
            streams.append([join])
        else:
            stream.append(join)
    return [Site(path, s[0].source, _last(s[-1].node, path, flow), s) for s in streams]


def _last(node: Node, path: str, flow: DataFlow) -> Node:
    """The sum, or what the block still does to it alone (an activation, say)."""
    while len(node.users) == 1:
        follower = next(iter(node.users))
        held = owner(follower)
        if not (held == path or held.startswith(path + ".")) or (
            flow.shapes.get(follower) != flow.shapes[node]
        ):
            break
        node = follower
    return node


def _same_series(
    module: TracedModule,
    sites: list[Site],
    calls: Mapping[str, list[tuple[Node, Node]]],
    flow: DataFlow,
) -> list[Site]:
    """Modules of the same series without a join: a first block of a stage, say."""
    taken = {site.path for site in sites}
    series = {site.series for site in sites if site.path.rpartition(".")[2][-1:].isdigit()}
    added = []
    for path, pairs in calls.items():
        if path in taken or _series(path) not in series or any(t.startswith(f"{path}.") for t in taken):
            continue
        if sum(_is_layer(part) for part in module.get_submodule(path).modules()) < 2:
            continue
        added += [Site(path, *pair) for pair in pairs if pair[0].op != "placeholder"]
    return added


def _numbered(
    module: TracedModule, calls: Mapping[str, list[tuple[Node, Node]]], flow: DataFlow, logits: Node
) -> list[Site]:
    """Without any join: the deepest numbered modules on the main line with several layers inside."""
    main_line = set(flow.cuts(logits))
    several = [
        path
        for path, pairs in calls.items()
        if path.rpartition(".")[2].isdigit()
        and all(set(pair) <= main_line and pair[0].op != "placeholder" for pair in pairs)
        and sum(_is_layer(part) for part in module.get_submodule(path).modules()) > 1
    ]
    deepest = [path for path in several if not any(other.startswith(f"{path}.") for other in several)]
    return [Site(path, *pair) for path in deepest for pair in calls[path]]


def _is_layer(part: nn.Module) -> bool:
    return isinstance(part, (nn.Linear, nn.modules.conv._ConvNd))


def _chain(module: TracedModule, flow: DataFlow, logits: Node) -> list[Site]:
    """The layers of a plain chain; each ends before the shape changes or the next layer reads it."""
    sites: list[Site] = []
    for node in flow.cuts(logits):
        shape = flow.shapes.get(node, ())
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if layer is not None and _is_layer(layer) and len(shape) > 2 and prod(shape[2:]) > 1:
            sites.append(Site(str(node.target), node.all_input_nodes[0], node))
        elif sites and shape == flow.shapes[sites[-1].output] and sites[-1].output in node.all_input_nodes:
            sites[-1].output = node
    return sites


def _drop_stem(
    module: TracedModule, flow: DataFlow, sites: list[Site], left_out: dict[str, str]
) -> list[Site]:
    """Without the series that live in the module that reads the images, where others live elsewhere."""
    common = 0
    parts = [site.path.split(".") for site in sites]
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts) and parts:
        common += 1
    first = next((node for node in flow.order if _reads_images(module, node)), None)
    if first is None or not sites:
        return sites
    stem = str(first.target).split(".")[: common + 1]
    inside = [site for site, path in zip(sites, parts, strict=True) if path[: common + 1] == stem]
    if len(inside) in (0, len(sites)) or len(stem) < common + 1:
        return sites
    if any(site.series == other.series for site in inside for other in sites if other not in inside):
        return sites
    left_out.update({site.path: "inside the stem" for site in inside})
    return [site for site in sites if site not in inside]


def _reads_images(module: TracedModule, node: Node) -> bool:
    """Whether a node is the first of a kind that has weights."""
    if node.op == "get_attr":
        return True
    return (
        node.op == "call_module"
        and next(module.get_submodule(str(node.target)).parameters(), None) is not None
    )


def _drop_small(module: TracedModule, sites: list[Site], left_out: dict[str, str]) -> list[Site]:
    """Without series that are next to nothing beside another: positional convolutions between blocks, say."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for site in sites:
        part = module.get_submodule(site.path)
        sizes[site.series].append(sum(parameter.numel() for parameter in part.parameters()))
    means = {series: sum(counts) / len(counts) for series, counts in sizes.items()}
    largest = max(means.values(), default=0)
    small = {series for series, mean in means.items() if mean < SMALL * largest}
    left_out.update({s.path: "next to nothing beside other blocks" for s in sites if s.series in small})
    return [site for site in sites if site.series not in small]
