"""Receipts: what an inject pass added, so that its inverse can take out exactly that.

Receipts nest like brackets: the last one in is the first one out, and `undo` refuses a graph that no longer
agrees.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vmkd_fx.errors import ReceiptError

if TYPE_CHECKING:
    from vmkd_fx.graph.traced import TracedModule

PREFIX = "vmkd"
"""The submodule under which everything lives that a pass adds; the student's own keys never start with it."""


@dataclass(frozen=True)
class Receipt:
    """What one inject pass did to a graph.

    Attributes:
        name: of the pass.
        config: its settings, as plain data.
        modules: paths of the submodules it added, all under the reserved prefix.
        nodes: names of the graph nodes it added, in graph order.
        before: the outputs before, name to node name; a bare tensor output has the name "".
        after: the outputs as the pass left them.
    """

    name: str
    config: dict[str, Any]
    modules: tuple[str, ...]
    nodes: tuple[str, ...]
    before: dict[str, str]
    after: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Receipt:
        """The inverse of `to_json`."""
        return cls(**{**data, "modules": tuple(data["modules"]), "nodes": tuple(data["nodes"])})


def undo(module: TracedModule) -> Receipt:
    """Take the last injection out of `module`, in place, and return its receipt; `recompile` it then.

    Raises:
        ReceiptError: nothing was injected, or the graph no longer agrees with the receipt.
    """
    from vmkd_fx.graph.edit import named_outputs, set_outputs

    if not module.receipts:
        raise ReceiptError(f"{module.info.name}: there is no injection left to take out")
    receipt = module.receipts[-1]
    nodes = {node.name: node for node in module.graph.nodes}
    _check(receipt, module, {name: node.name for name, node in named_outputs(module).items()}, set(nodes))

    set_outputs(module, {name: nodes[node] for name, node in receipt.before.items()})
    for name in reversed(receipt.nodes):
        if readers := [user.name for user in nodes[name].users]:
            raise ReceiptError(
                f"{receipt.name}: node {name!r} was added by this pass but is read by {', '.join(readers)}; "
                "take out what was built on it first"
            )
        module.graph.erase_node(nodes[name])
    for path in receipt.modules:
        _delete_submodule(module, path)
    module.meta["receipts"] = module.receipts[:-1]
    return receipt


def _check(receipt: Receipt, module: TracedModule, outputs: dict[str, str], names: set[str]) -> None:
    if outputs != receipt.after:
        raise ReceiptError(
            f"{receipt.name}: the graph's outputs are {outputs}, the receipt left {receipt.after}; "
            "was the graph edited in between?"
        )
    missing = [name for name in (*receipt.nodes, *receipt.before.values()) if name not in names]
    if missing:
        raise ReceiptError(
            f"{receipt.name}: the graph has no node {missing[0]!r} any more, which the receipt names"
        )
    present = dict(module.named_modules())
    missing = [path for path in receipt.modules if path not in present]
    if missing:
        raise ReceiptError(f"{receipt.name}: the module {missing[0]!r} is gone, which the receipt names")


def _delete_submodule(module: TracedModule, path: str) -> None:
    """Remove a submodule and every container that it leaves empty."""
    while path:
        parent_path, _, name = path.rpartition(".")
        parent = module.get_submodule(parent_path)
        del parent._modules[name]
        if parent_path == "" or parent._modules or parent._parameters or parent._buffers:
            return
        path = parent_path
