"""The graph module that everything here stands on: torch.fx's, with nothing lost on the way.

torch.fx keeps only what the graph mentions; a traced student must keep every key of its state dict, also
those that its forward never reads, through deepcopy and pickling too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import nn
from torch.fx.graph import PythonCode

from vmkd_fx.graph.groups import Depths
from vmkd_fx.graph.info import ModelInfo
from vmkd_fx.graph.nodes import PlainNode, graph_of, plain_nodes
from vmkd_fx.graph.receipt import Receipt
from vmkd_fx.graph.share import INTERNAL, shared_view
from vmkd_fx.steps import Ledger

HELD = "held_modes"
"""Key of meta: by mode, the paths of parts that the model's own `train(mode)` leaves in the other mode."""

_CHECKPOINTED = "grad_checkpointing"
"""Key of meta under which the blocks stand that run again in the backward pass."""


_KEPT = (
    *("_parameters", "_buffers", "_non_persistent_buffers_set"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
"""What every module holds and torch.fx does not hand on. Forward hooks stand in the graph."""


@dataclass(frozen=True)
class Call:
    """One call of a module in the graph: names of the nodes that enter it and of those it returns."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Closed:
    """What stayed one node and is not torch.nn's, a module or a method that others call: path and why."""

    path: str
    reason: str


_editing: ContextVar[bool] = ContextVar("editing", default=False)
"""Whether the graph that is being made will be edited and compiled afterwards."""


class TracedModule(torch.fx.GraphModule):
    """A model as a torch.fx graph over the same parameters.

    Attributes:
        info: what the model says about itself.
        receipts: of the inject passes that changed the graph, in the order in which they ran.
        closed: modules that tracing left closed, with the reason.
        calls: of the modules that tracing opened, by path.
        fixed_by: places of the model's code where the height or width of the images decided what is done, so
            that the graph holds for that size alone; empty where it holds for any.
        ledger: what lowering did; empty before.
        depths: how deep each parameter of the model stands, and what weight decay leaves alone.
    """

    def __init__(self, root: nn.Module, graph: torch.fx.Graph, class_name: str = "TracedModule") -> None:
        super().__init__(root, graph, class_name)
        for name in _KEPT:
            self.__dict__[name] = root.__dict__[name]
        self.__dict__["_modules"] = dict(root._modules)
        self.meta = dict(getattr(root, "meta", {}))
        if self.meta.get(_CHECKPOINTED):
            self.recompile()

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
    def calls(self) -> dict[str, list[Call]]:
        return self.meta.get("calls", {})

    @property
    def fixed_by(self) -> tuple[str, ...]:
        return self.meta.get("fixed_by", ())

    @property
    def ledger(self) -> Ledger:
        return self.meta.get("ledger", Ledger())

    @property
    def depths(self) -> Depths:
        return self.meta.get("depths", Depths())

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone beside one-dimensional ones, as timm asks for them."""
        return self.depths.left_alone(name for name, _ in self.named_parameters())

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Parameter name to layer, from 0 at the images, as timm's layer-wise decay asks for it."""
        return self.depths.layer_of

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the insides of blocks once more in the backward pass instead of keeping them (Chen et al.
        2016).

        Less memory for about one forward pass more per step; outputs, gradients and running statistics stay
        as they are. It acts in training mode with gradients on, and whatever is made of this graph keeps it:
        copies, pickles, and what a pass injects into it.

            graph = vx.trace(student)
            graph.set_grad_checkpointing()
            task = vx.wrap(graph, "std", teachers=[teacher])

        Raises:
            MatchError: the model has no blocks, or none that can be run twice.
        """
        from vmkd_fx.graph.checkpointing import find_blocks

        self.meta[_CHECKPOINTED] = find_blocks(self) if enable else ()
        self.recompile()

    def train(self, mode: bool = True) -> TracedModule:
        """Set the mode, and leave in the other one whatever the model's own `train` leaves there."""
        super().train(mode)
        for path in self.meta.get(HELD, {}).get(bool(mode), ()):
            with contextlib.suppress(AttributeError):  # what a pass took out
                self.get_submodule(path).training = not mode
        return self

    def recompile(self) -> PythonCode:
        if _editing.get():
            return PythonCode("", {}, None)
        code = super().recompile()
        if blocks := self.__dict__.get("meta", {}).get(_CHECKPOINTED):
            from vmkd_fx.graph.checkpointing import checkpointed_forward

            type(self).forward = checkpointed_forward(self, blocks)
        return code

    def _deepcopy_init(self) -> Callable[..., None]:
        return TracedModule.__init__

    def __copy__(self) -> TracedModule:
        return fork(self)

    def __reduce__(self) -> tuple[Any, ...]:
        body = {name: value for name, value in self.__dict__.items() if name != "_graph"}
        return _restore, (body, plain_nodes(self.graph))


def fork(module: TracedModule, *, to_edit: bool = False, throwaway: bool = False) -> TracedModule:
    """The same parameters under a graph and a module tree of their own, free to be edited.

    With `to_edit` it cannot be called before `recompile()`: whoever edits it ends with that, and generating
    code is most of the work. In a `throwaway` fork other tensors may be put under the same names.
    """
    graph = torch.fx.Graph(tracer_cls=module.graph._tracer_cls)
    value = graph.graph_copy(module.graph, {})
    output = next(reversed(module.graph.nodes))
    graph.output(value, output.type).meta.update(output.meta)
    with editing() if to_edit else contextlib.nullcontext():
        return TracedModule(shared_view(module, throwaway=throwaway), graph)


@contextlib.contextmanager
def editing() -> Iterator[None]:
    """No graph is compiled in here: several edits in a row need it once, at their end."""
    token = _editing.set(True)
    try:
        yield
    finally:
        _editing.reset(token)


def _restore(body: dict[str, Any], nodes: list[PlainNode]) -> TracedModule:
    root = nn.Module()
    root.__dict__.update(body)
    module = TracedModule(root, graph_of(nodes, body.get("_tracer_cls")))
    for name, value in body.items():
        if name in INTERNAL or name not in module.__dict__:
            module.__dict__[name] = value
    return module
