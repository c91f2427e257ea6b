"""More tokens in a student's stream: where prefix and patches become one, and what must count on the new
ones.

Tokens stand between the prefix tokens and the patches. What reads the stream further on is moved by their
number, or refused where it holds for the old number alone.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn
from torch.fx import Node

from vmkd_fx.errors import MatchError
from vmkd_fx.graph.edit import drop_dead_nodes, owner
from vmkd_fx.graph.joins import DataFlow
from vmkd_fx.graph.nodes import OWNER
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.replace import within
from vmkd_fx.graph.rules import Sized
from vmkd_fx.graph.shapes import Shape
from vmkd_fx.graph.trace import trace
from vmkd_fx.graph.traced import Call, TracedModule
from vmkd_fx.graph.values import NodeValues

_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_HAND_ON = (nn.Identity, nn.modules.dropout._DropoutNd)
_BY_PLACE_LAYERS = (nn.modules.conv._ConvNd, nn.RNNBase, nn.Fold, nn.Unfold)
_BY_PLACE = {
    **dict.fromkeys(("unbind", "narrow", "select", "cumsum", "index_select", "gather", "unfold"), 1),
    **dict.fromkeys(("split", "chunk", "tensor_split"), 2),
    **dict.fromkeys(("flip", "roll", "pad", "topk", "sort", "argsort", "scatter", "take_along_dim"), 0),
}
"""Operations that take tokens by their place, and where their axis stands among the arguments; 0 where it is
not one number.
"""


@dataclass(frozen=True)
class Stream:
    """Where prefix and patches become one stream.

    Attributes:
        joined: the node that holds it (B, prefix + P, C), positions included where they are added there.
        patches: the patches (B, P, C) before any position.
        has_positions: whether each token gets a position behind the concatenation.
        prefix: tokens in front of the patches.
        count, channels: P and C.
    """

    joined: Node
    patches: Node
    has_positions: bool
    prefix: int
    count: int
    channels: int


def insert_opened(module: TracedModule, path: str, part: nn.Module, images: Node, before: Node) -> Node:
    """Install `part` at `path` and write what it computes from `images` into the graph, node by node.

    Args:
        before: the node in front of which it is written.

    Returns:
        The node that holds its result.
    """
    traced = trace(part, input_size=module.info.need_input_size())
    module.add_submodule(path, part.train(module.training))
    copies: dict[Node, Node] = {}
    result = images
    with module.graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copies[node] = images
            elif node.op == "output":
                result = copies[node.all_input_nodes[0]]
            else:
                copy = copies[node] = module.graph.node_copy(node, copies.__getitem__)
                if node.op in ("call_module", "get_attr"):
                    copy.target = f"{path}.{node.target}"
                copy.meta[OWNER] = ".".join(filter(None, (path, str(node.meta.get(OWNER, "")))))
    names = {node.name: copy.name for node, copy in copies.items()}
    calls = {path: [Call((images.name,), (result.name,))]}
    for inner, made in traced.calls.items():
        calls[f"{path}.{inner}"] = [
            Call(tuple(names[name] for name in call.inputs), tuple(names[name] for name in call.outputs))
            for call in made
        ]
    module.meta["calls"] = {**module.calls, **calls}
    return result


def replace_patches(module: TracedModule, patches: Node, new: Node) -> None:
    """Let `new` (B, P, C) be what was `patches`, and take out the layers that made these.

    Raises:
        MatchError: something else reads what those layers computed, or they have parameters of their own
            outside any layer.
    """
    made_by = _ancestors(patches)
    called = {str(node.target) for node in made_by if node.op == "call_module"}
    rename_inputs(module, patches, new)
    patches.replace_all_uses_with(new)
    drop_dead_nodes(module)
    left = [node for node in module.graph.nodes if node.op in ("call_module", "get_attr")]
    for node in left:
        if any(within(str(node.target), path) or within(path, str(node.target)) for path in called):
            raise MatchError(
                f"aligned tokens replace the patch embedding of {module.info.name}, and {node.name} in it is "
                "read by other parts too; tokens='random' keeps it"
            )
    if loose := [node for node in made_by if node.op == "get_attr" and node not in left]:
        raise MatchError(
            f"aligned tokens replace the patch embedding of {module.info.name}, and that reads the parameter "
            f"{loose[0].target!r} outside any layer; tokens='random' keeps it"
        )
    for path in sorted(called):
        _remove(module, path)
    held = {name for name, _ in module.named_modules()}
    module.meta["calls"] = {path: calls for path, calls in module.calls.items() if path in held}
    module.meta["closed"] = tuple(part for part in module.closed if part.path in held)


def rename_inputs(module: TracedModule, old: Node, new: Node) -> None:
    """Let the recorded calls of modules that `old` enters be entered by `new`."""
    module.meta["calls"] = {
        path: [
            Call(tuple(new.name if name == old.name else name for name in call.inputs), call.outputs)
            for call in calls
        ]
        for path, calls in module.calls.items()
    }


def find_stream(module: TracedModule, known: Anatomy, flow: DataFlow) -> Stream:
    """Where class token and patches are put together.

    Raises:
        MatchError: no such place stands before the blocks.
    """
    kinds = {(block.layout, block.prefix_tokens, block.tokens, block.channels) for block in known.blocks}
    layout, prefix, count, channels = next(iter(kinds), ("", 0, 0, 0))
    if len(kinds) != 1 or layout != "NLC" or not prefix:
        found = ", ".join(
            f"{kind[2]} patches ({kind[0]}) behind {kind[1]} prefix tokens" for kind in sorted(kinds)
        )
        raise MatchError(
            "CiT's tokens stand beside a class token that all blocks see, with as many patches in each, and "
            f"those of {known.model} see {found or 'no tokens: there are none'}; for a student without a "
            "class token CiT is its heads alone: inject_bias_heads(student, BiasHeadConfig())"
        )
    entry = next(node for node in module.graph.nodes if node.name == known.blocks[0].input)
    on_the_way = [node for node in flow.cuts(entry) if node in flow.token_joins]
    parts: Any = _parts(on_the_way[-1]) if on_the_way else ()
    lengths = [flow.shapes[part][1] for part in parts]
    if not lengths or lengths[-1] != count or sum(lengths) != prefix + count or parts[-1] not in flow:
        raise MatchError(
            f"CiT's tokens go where {known.model} puts {prefix} prefix tokens before {count} patches, and "
            f"before {known.blocks[0].path} it joins {lengths or 'nothing'} along the tokens"
        )
    joined = on_the_way[-1]
    readers = list(joined.users)
    has_positions = len(readers) == 1 and _constant_added(readers[0], flow) is joined
    return Stream(
        readers[0] if has_positions else joined,
        _before_positions(module, parts[-1], flow),
        has_positions,
        prefix,
        count,
        channels,
    )


def _parts(node: Node) -> Any:
    return node.args[0] if node.args else node.kwargs["tensors"]


def _constant_added(node: Node, flow: DataFlow) -> Node | None:
    """What is computed from the images in a sum with something that is not; None for other nodes."""
    data = [source for source in node.all_input_nodes if source in flow]
    return data[0] if node.target in _SUMS and len(data) == 1 and len(node.all_input_nodes) == 2 else None


def _before_positions(module: TracedModule, patches: Node, flow: DataFlow) -> Node:
    """The patches before a position was added to them, where one was."""
    node = patches
    while node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), _HAND_ON):
        node = node.all_input_nodes[0]
    return _constant_added(node, flow) or patches


def join_tokens(module: TracedModule, stream: Stream, tokens: list[Node], positions: str) -> Node:
    """The longer stream [prefix, tokens, patches], which all read that read the old one.

    Args:
        tokens: (B, 1, C) each.
        positions: path of the parameter that holds theirs, for a stream that has positions.
    """
    graph, old = module.graph, stream.joined
    readers = list(old.users)
    after = max([old, *tokens], key=list(graph.nodes).index)
    with graph.inserting_before(after.next):
        if stream.has_positions:
            table = graph.get_attr(positions)
            for index, token in enumerate(tokens):
                one = graph.call_function(operator.getitem, (table, _rows(index, index + 1)))
                tokens[index] = graph.call_function(operator.add, (token, one))
        prefix = graph.call_function(operator.getitem, (old, _rows(None, stream.prefix)))
        patches = graph.call_function(operator.getitem, (old, _rows(stream.prefix, None)))
        joined = graph.call_function(torch.cat, ([prefix, *tokens, patches],), {"dim": 1})
    for reader in readers:
        reader.replace_input_with(old, joined)
    rename_inputs(module, old, joined)
    return joined


def _rows(first: int | None, last: int | None) -> tuple[slice, slice]:
    return slice(None), slice(first, last)


def fit_to_more_tokens(
    module: TracedModule, before: Mapping[str, Shape], joined: Node, stream: Stream, added: int
) -> None:
    """Let what reads the longer stream `joined` count on `added` more prefix tokens, and compile.

    Indices and slices between prefix tokens and patches are moved. Everything else must take any number of
    tokens, and grow by `added` where it grows at all; a mean over all tokens takes the new ones in.

    Args:
        before: shapes by node name as they were.

    Raises:
        MatchError: a part holds for the old number of tokens, or may; says which.
    """
    values = NodeValues(module, (2, *module.info.need_input_size()), rules=False)  # rules look at no bias
    grown: dict[Node, set[int]] = {joined: {1}}
    for node in module.graph.nodes:
        sources = [source for source in node.all_input_nodes if source in grown]
        if node.op == "output" or not sources:
            continue
        try:
            for source in (source for source in sources if grown[source]):
                shape = before[stream.joined.name if source is joined else source.name]
                _fit(module, node, source, shape, grown[source], stream, added)
            value = values.of(node)
        except Exception as error:
            raise _counts_tokens(module, node, stream, error) from error
        grown[node] = set()
        if isinstance(value, Sized):
            old, new = before.get(node.name, ()), tuple(value.shape)
            grown[node] = {axis for axis, length in enumerate(old) if new[axis : axis + 1] != (length,)}
            if len(old) != len(new) or any(new[axis] != old[axis] + added for axis in grown[node]):
                raise _counts_tokens(module, node, stream, f"{old} would become {new}")
    module.graph.lint()
    module.recompile()


def _counts_tokens(module: TracedModule, node: Node, stream: Stream, why: object) -> MatchError:
    reason = str(why).strip().partition("\n")[0]
    return MatchError(
        f"CiT adds tokens to the {stream.prefix + stream.count} of {module.info.name}, and {node.name} in "
        f"{owner(node) or 'its own forward'} holds for that number alone, as with a relative position bias: "
        f"{reason}"
    )


def _fit(
    module: TracedModule,
    node: Node,
    source: Node,
    shape: Shape,
    axes: set[int],
    stream: Stream,
    added: int,
) -> None:
    """Move the index of a node that reads `source`, of this old shape with tokens along `axes`.

    Raises:
        MatchError: the node treats tokens by their place in some other way.
    """
    if node.op == "call_module":
        path, layer = str(node.target), module.get_submodule(str(node.target))
        if getattr(layer, "num_prefix_tokens", 0) or isinstance(layer, _BY_PLACE_LAYERS):
            raise MatchError(f"{path}, a {type(layer).__name__}, takes tokens by their place")
        is_closed = any(within(path, part.path) for part in module.closed)
        if is_closed and not isinstance(layer, (*_HAND_ON, DropPath)):
            raise MatchError(f"what the closed {path} does with tokens is not known")
        return
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.args[:1] != (source,):
        return
    if node.target is operator.getitem:
        node.args = (source, _moved(node.args[1], len(shape), axes, stream, added))
    elif name in _BY_PLACE:
        at = _BY_PLACE[name]
        dim = node.kwargs.get("dim", node.args[at] if at and at < len(node.args) else 0)
        if not isinstance(dim, int) or not at or dim % len(shape) in axes:
            raise MatchError(f"{name} takes tokens by their place")


def _moved(index: Any, rank: int, axes: set[int], stream: Stream, added: int) -> Any:
    """An index that means the same prefix tokens and the same patches in the longer stream; `:prefix` means
    all prefix tokens.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [item for item in items if not isinstance(item, Node)]:
        place = items.index(Ellipsis)
        missing = rank - sum(item is not None for item in items) + 1
        items[place : place + 1] = [slice(None)] * missing
    axis = 0
    for place, item in enumerate(items):
        if item is None:
            continue
        if axis in axes:
            items[place] = _moved_item(item, stream, added)
        axis += 1
    return tuple(items)


def _moved_item(item: Any, stream: Stream, added: int) -> Any:
    def bound(value: int) -> int:
        return value + added * (value >= stream.prefix) - added * (value < -stream.count)

    if isinstance(item, int):
        return bound(item)
    ends = (item.start, item.stop) if isinstance(item, slice) and item.step in (None, 1) else (item,)
    if not all(end is None or isinstance(end, int) for end in ends):
        raise MatchError(f"tokens are taken by the index {item}")
    return slice(*(end if end is None else bound(end) for end in ends))


def _ancestors(node: Node) -> set[Node]:
    found, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                todo.append(source)
    return found


def _remove(module: TracedModule, path: str) -> None:
    """Remove a submodule and every container that it leaves empty."""
    parts = path.split(".")
    paths = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    for inner, outer in pairwise(paths):
        holder = module.get_submodule(outer)
        holder._modules.pop(inner.rpartition(".")[2], None)
        if holder._modules or holder._parameters or holder._buffers:
            return
