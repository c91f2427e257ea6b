"""The tracer: torch.fx's, with timm's leaf rules and constants that leave the traced model alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import nn
from torch.fx import Node, Proxy

from vmkd_fx.errors import TraceError
from vmkd_fx.graph.receipt import PREFIX

CONSTANTS = "constants"


class GraphTracer(torch.fx.Tracer):
    """Traces one module tree; `closed` holds the paths of modules to keep as one node each.

    Arguments of forward with a default keep it, so that only images are an input. After a failure,
    `failed_in` is the path of the innermost module that was being traced.
    """

    def __init__(self, closed: Iterable[str] = ()) -> None:
        super().__init__(autowrap_functions=tuple(f for f in get_notrace_functions() if callable(f)))
        self.closed = frozenset(closed)
        self.leaf_classes = tuple(get_notrace_modules())
        self.failed_in: str | None = None
        self._names: dict[int, str] | None = None
        self._made = 0
        self._scope = _scope()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.closed
            or type(m) in self.leaf_classes
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            path = (self.submodule_paths or {}).get(m, "")
            if self.failed_in is None and not self.is_leaf_module(m, path):  # closing a leaf mends nothing
                self.failed_in = path
            raise

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Node:
        if (scope := _scope()) != self._scope:
            raise TraceError(f"{target} runs under {scope}, which a graph does not record")
        if target is torch._assert and len(args) == 2:  # while tracing, a message has no value to name
            args = (args[0], re.sub(r" ?\(?Proxy\([^()]*\)\)?", "", str(args[1])))
        return super().create_node(kind, target, args, kwargs, *rest, **named)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        inputs = [p for p in positional if p.default is p.empty] or positional[:1]
        return root_fn, [self.root, *(self.create_proxy("placeholder", p.name, (), {}) for p in inputs)]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self._tensor_names().get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            name = self._tensor_names().get(id(a)) or self._store_constant(a)
            return self.create_node("get_attr", name, (), {})
        return super().create_arg(a)

    def _tensor_names(self) -> dict[int, str]:
        """Names by identity, looked up once: torch.fx's own search makes tracing quadratic in the model."""
        if self._names is None:
            tensors = [*self.root.named_buffers(), *self.root.named_parameters()]
            self._names = {id(tensor): name for name, tensor in reversed(tensors)}
        return self._names

    def _store_constant(self, value: torch.Tensor) -> str:
        """Keep a tensor that forward made up as a buffer outside the state dict, under the reserved prefix.

        The name is its place among them, so that two traces of one model agree; another value takes another
        name.
        """
        reserved = self.root._modules.setdefault(PREFIX, nn.Module())
        assert reserved is not None
        holder = reserved._modules.setdefault(CONSTANTS, nn.Module())
        assert holder is not None
        name = f"value_{self._made}"
        self._made += 1
        while (other := holder._buffers.get(name)) is not None and not torch.equal(other, value):
            name += "_"
        # Not by register_buffer, whose look at the attribute would be traced.
        holder._buffers[name] = value.detach()
        holder._non_persistent_buffers_set.add(name)
        path = f"{PREFIX}.{CONSTANTS}.{name}"
        self._tensor_names()[id(value)] = path
        return path


def _scope() -> str:
    """What `with` blocks of torch are in force, which decides what an operation does and leaves no node."""
    gradients = "grad" if torch.is_grad_enabled() else "no_grad"
    return f"{gradients}, autocast {torch.is_autocast_enabled('cpu')}, {torch.is_autocast_enabled('cuda')}"
