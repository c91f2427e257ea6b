"""Replacements: a part of the student gives way to another for good.

The counterpart of `edit.Injection`. What an injection adds is training's and comes out again; what a
replacement puts in is the student's own, stands under the path of what it replaced, and `strip` leaves it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from vmkd_fx.errors import MatchError, ReceiptError
from vmkd_fx.graph.nodes import OWNER
from vmkd_fx.graph.traced import TracedModule

_META = "replacements"


@dataclass(frozen=True)
class Replaced:
    """What one replacement did to a student.

    Attributes:
        name: of the pass.
        config: its settings, as plain data.
        paths: of the modules that it put in.
    """

    name: str
    config: dict[str, Any]
    paths: tuple[str, ...]


def replacements(module: TracedModule) -> tuple[Replaced, ...]:
    """What was replaced in a graph, in the order in which it was; copies, pickles and lowering keep it."""
    found: tuple[Replaced, ...] = module.meta.get(_META, ())
    return found


def record_replacement(module: TracedModule, replaced: Replaced) -> None:
    """Write `replaced` down in the graph that it happened to."""
    module.meta[_META] = (*replacements(module), replaced)


def refuse_additions(module: TracedModule, name: str) -> None:
    """Refuse a graph that holds what injections added: their receipts would no longer fit it.

    Raises:
        ReceiptError: names them and the order that works.
    """
    if module.receipts:
        added = ", ".join(receipt.name for receipt in module.receipts)
        raise ReceiptError(
            f"{name} replaces parts of {module.info.name} itself, and {added} was added to it before; "
            "replace mixers first, then add tokens"
        )


class Replacement:
    """Puts modules in the place of pieces of a graph and writes down where.

    Use it on a graph of one's own (`fork`), then call `finish`. The modules that the graph was traced from
    stay as they are: the graph has a module tree of its own.

    Raises:
        ReceiptError: something was added to the graph before.
    """

    def __init__(self, module: TracedModule, name: str, config: dict[str, object]) -> None:
        refuse_additions(module, name)
        self.module = module
        self.name = name
        self.config = config
        self.paths: list[str] = []

    def put(self, path: str, submodule: nn.Module, entry: Node, end: Node) -> Node:
        """Let `submodule` at `path` compute from `entry` what those read that read `end`.

        Nodes that nobody reads any more go, with what stood at `path` and the modules that only they called.

        Raises:
            MatchError: what stood at `path` is read by other nodes as well.
        """
        with self.module.graph.inserting_before(end):
            node = self.module.graph.call_module(path, (entry,))
        node.meta[OWNER] = path.rpartition(".")[0]
        end.replace_all_uses_with(node)
        called = self._erase(end)
        self._refuse_readers(path, node)
        parent, _, name = path.rpartition(".")
        holder = self.module.get_submodule(parent)
        holder._modules[name] = submodule.train(holder.training)
        self._drop(other for other in called if not within(other, path))
        self._forget_calls(path)
        self.paths.append(path)
        return node

    def finish(self) -> TracedModule:
        """Write the replacement down and compile."""
        record_replacement(self.module, Replaced(self.name, self.config, tuple(self.paths)))
        self.module.graph.lint()
        self.module.recompile()
        return self.module

    def _erase(self, end: Node) -> set[str]:
        """Erase a node that nobody reads and all that only it read; return the modules that these called."""
        called: set[str] = set()
        todo = [end]
        while todo:
            node = todo.pop()
            if node.users or node.op == "placeholder":
                continue
            sources = node.all_input_nodes
            self.module.graph.erase_node(node)
            if node.op == "call_module":
                called.add(str(node.target))
            todo += [source for source in sources if not source.users]
        return called

    def _refuse_readers(self, path: str, new: Node) -> None:
        for node in self.module.graph.nodes:
            if node is not new and refers_to(node, path):
                raise MatchError(
                    f"{self.name}: {path} of {self.module.info.name} cannot be replaced, for {node.name}, "
                    "which stays, reads it too"
                )

    def _drop(self, paths: Iterable[str]) -> None:
        """Remove modules that no node calls any more."""
        left = {str(node.target) for node in self.module.graph.nodes if node.op == "call_module"}
        for path in paths:
            parent, _, name = path.rpartition(".")
            if path not in left:
                self.module.get_submodule(parent)._modules.pop(name, None)

    def _forget_calls(self, path: str) -> None:
        calls = {called: value for called, value in self.module.calls.items() if not within(called, path)}
        closed = tuple(part for part in self.module.closed if not within(part.path, path))
        self.module.meta.update(calls=calls, closed=closed)


def within(path: str, outer: str) -> bool:
    """Whether a module or a parameter is `outer` or lies in it."""
    return path == outer or path.startswith(f"{outer}.")


def refers_to(node: Node, path: str) -> bool:
    """Whether a node calls the module at `path`, or reads a parameter or a part of it."""
    return node.op in ("call_module", "get_attr") and within(str(node.target), path)
