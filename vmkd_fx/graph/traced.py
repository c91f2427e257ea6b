"""The graph module that everything here stands on: torch.fx's, with nothing lost on the way.

torch.fx keeps only what the graph mentions; a traced student must keep every key of its state dict, also
those that its forward never reads, through deepcopy and pickling too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import nn
from torch.fx.graph_module import _deserialize_graph_module, _forward_from_src

from vmkd_fx.graph.info import ModelInfo
from vmkd_fx.graph.receipt import Receipt
from vmkd_fx.graph.share import shared_view
from vmkd_fx.steps import Ledger


@dataclass(frozen=True)
class Closed:
    """A module that stayed one node in the graph although it is not torch.nn's: its path and why."""

    path: str
    reason: str


class TracedModule(torch.fx.GraphModule):
    """A model as a torch.fx graph over the same parameters.

    Attributes:
        info: what the model says about itself.
        receipts: of the inject passes that changed the graph, in the order in which they ran.
        closed: modules that tracing left closed, with the reason.
        ledger: what lowering did; empty before.
    """

    def __init__(self, root: nn.Module, graph: torch.fx.Graph, class_name: str = "TracedModule") -> None:
        super().__init__(root, graph, class_name)
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = root.__dict__[name]
        self.__dict__["_modules"] = dict(root._modules)
        self.meta = dict(getattr(root, "meta", {}))

    @property
    def info(self) -> ModelInfo:
        return self.meta["info"]

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        return self.meta.get("receipts", ())

    @property
    def closed(self) -> tuple[Closed, ...]:
        return self.meta.get("closed", ())

    @property
    def ledger(self) -> Ledger:
        return self.meta.get("ledger", Ledger())

    def _deepcopy_init(self) -> Callable[..., None]:
        return TracedModule.__init__

    def __copy__(self) -> TracedModule:
        return fork(self)

    def __reduce__(self) -> tuple[Any, ...]:
        _, (body, import_block) = super().__reduce__()
        return _restore, (body, import_block)


def fork(module: TracedModule) -> TracedModule:
    """The same parameters under a graph and a module tree of their own, free to be edited."""
    graph = torch.fx.Graph(tracer_cls=module.graph._tracer_cls)
    value = graph.graph_copy(module.graph, {})
    output = next(reversed(module.graph.nodes))
    graph.output(value, output.type).meta.update(output.meta)
    return TracedModule(shared_view(module), graph)


def _restore(body: dict[str, Any], import_block: str) -> nn.Module:
    forward = _forward_from_src(import_block + body["_code"], {})
    module = _deserialize_graph_module(forward, body, graph_module_cls=TracedModule)
    module.meta = body["meta"]
    return module
