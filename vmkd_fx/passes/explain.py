"""`explain`: what happened to one node or one module on the way down."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from vmkd_fx.errors import UnknownNameError
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.rewrite import ATTRIBUTES, where
from vmkd_fx.table import table

_MOST = 12


def explain(lowered: TracedModule, name: str) -> str:
    """The story of a node or of a module of the model: which passes rewrote it, which left it alone and why,
    and what of it stands in the result.

    Args:
        lowered: what `lower` returned.
        name: of a node, as in the ledger or in the result, or the path of a module with all that is in it.

    Raises:
        UnknownNameError: no pass and no node of the result knows the name; the near ones are listed.
    """
    events = [event for event in _events(lowered) if _belongs(name, event[1], event[2])]
    nodes = [node for node in lowered.graph.nodes if node.op == "call_function"]
    left = [node for node in nodes if _belongs(name, node.name, where(node))]
    known = _known(lowered)
    if name not in known:
        raise UnknownNameError("node or module", name, known, where=lowered.info.name)
    told = table(("pass", "node", "module", "what"), events) if events else "no pass rewrote or refused it"
    return "\n".join((f"{name} in {lowered.info.name}", "", told, "", *_standing(left)))


def _events(lowered: TracedModule) -> Iterator[tuple[str, str, str, str]]:
    """Pass, node, module and what was done, in order; of a refused node the module as found elsewhere."""
    modules = {node.name: where(node) for node in lowered.graph.nodes if node.op == "call_function"}
    modules |= {site.node: site.where for step in lowered.ledger.steps for site in step.sites}
    for step in lowered.ledger.steps:
        for site in step.sites:
            yield step.name, site.node, site.where, f"rewrote it: {site.what}" if site.what else "rewrote it"
        for refusal in step.refused:
            yield step.name, refusal.node, modules.get(refusal.node, ""), f"left it alone: {refusal.reason}"


def _belongs(name: str, node: str, path: str) -> bool:
    return name == node or f"{path}.".startswith(f"{name}.")


def _known(lowered: TracedModule) -> set[str]:
    """Names of nodes and paths of modules that a user may ask about."""
    names = {name for _, node, path, _ in _events(lowered) for name in (node, path)}
    paths = {*lowered.calls, *(path for path, _ in lowered.named_modules())}
    for node in lowered.graph.nodes:
        if node.op == "call_function":
            names.add(node.name)
    paths |= {path.rpartition(".")[0] for path in names | paths}
    return {name for name in names | paths if name and not name.startswith(ATTRIBUTES)}


def _standing(nodes: list[Node]) -> list[str]:
    if not nodes:
        return ["nothing of it is left in the result"]
    lines = [f"  {_shown(node)}" for node in nodes[:_MOST]]
    more = len(nodes) - _MOST
    return ["in the result:", *lines, *([f"  and {more} more nodes"] if more > 0 else [])]


def _shown(node: Node) -> str:
    """`linear_2 = aten.linear(gelu, weight of blocks.0.mlp.fc2, ...)`."""
    given = ", ".join(_argument(value) for value in (*node.args, *node.kwargs.values()))
    name = str(node.target) if hasattr(node.target, "_schema") else getattr(node.target, "__name__", "?")
    return f"{node.name} = {name}({given})"


def _argument(value: object) -> str:
    if isinstance(value, Node):
        return str(value.target) if value.op == "get_attr" else value.name
    return str(value)
