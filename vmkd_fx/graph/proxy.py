"""Proxies that can be asked: a length, a number or a decision is looked up where images of one size fix it.

torch.fx's proxies record operations and refuse everything else. These let Python's own control flow through
wherever its outcome depends on shapes alone, and record assignments into tensors.
"""

from __future__ import annotations

import dis
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import Attribute, ParameterProxy

from vmkd_fx.graph.edit import changes_in_place, is_view

if TYPE_CHECKING:
    from vmkd_fx.graph.tracer import GraphTracer

CONSTRUCTORS = (
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "tensor", "zeros"),
    *("tril_indices", "triu_indices"),
)
"""Functions of torch that make a tensor from numbers; torch.fx does not see them when a number is a proxy."""

RANDOM = ("normal", "rand", "randint", "randn", "randperm")
"""Those that draw numbers, which another run must draw anew."""

AUGMENTED = "vmkd_augmented"
"""Mark, in a node's meta, of `x += y`, which is recorded as `x = x + y`."""


_FRESH = (
    *(nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd),
    *(nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softmax, nn.Embedding),
)
"""Layers whose result lies in memory of its own."""

_MAY_SHARE = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "drop_path"),
    *("dropout_", "ravel", "diagonal", "unfold", "as_strided", "tensor_split", "hsplit", "vsplit", "real"),
    *("imag", "view_as_real", "view_as_complex", "split_with_sizes", "broadcast_to", "broadcast_tensors"),
    *("swapdims", "moveaxis", "squeeze_", "pad", "rearrange", "adjoint", "data", "bfloat16", "positive"),
    *(
        "identity",
        "relu_",
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "asarray",
        "as_tensor",
        "getattr",
        "iter",
    ),
}
"""Functions and methods besides plain views that may return their operand or a view of it."""


class AskableProxy(Proxy):
    """A proxy whose shape-dependent value Python may use."""

    tracer: GraphTracer

    def __getattr__(self, k: str) -> Attribute:
        return AskableAttribute(self, k)

    def __iter__(self) -> Iterator[Any]:
        frame = inspect.currentframe()
        caller = frame.f_back if frame is not None else None
        count = None if caller is None else _unpackings(caller.f_code).get(caller.f_lasti)
        return self.tracer.iter(self) if count is None else unpack(self, count)

    def __len__(self) -> int:
        return self.tracer.length(self.node)

    def __index__(self) -> int:
        return operator.index(self.tracer.ask(self.node))

    def __int__(self) -> int:
        return int(self.tracer.ask(self.node))

    def __float__(self) -> float:
        return float(self.tracer.ask(self.node))

    def __round__(self, digits: int | None = None) -> int | float:
        return round(self.tracer.ask(self.node), digits)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class AskableAttribute(Attribute, AskableProxy):
    """An attribute of a proxy, `x.shape` say."""


class AskableParameter(ParameterProxy, AskableProxy):
    """A parameter; its shape is a constant."""

    def size(self, dim: int | None = None) -> Any:  # torch.fx's takes no dimension
        return self.param.size() if dim is None else self.param.size(dim)


def _augmented(operation: Callable[..., Any]) -> Callable[..., Proxy]:
    def record(self: AskableProxy, other: Any) -> Proxy:
        result = operation(self, other)
        result.node.meta[AUGMENTED] = True
        return result

    return record


_IN_PLACE: dict[Any, str] = {
    operator.add: "add_",
    operator.sub: "sub_",
    operator.mul: "mul_",
    operator.truediv: "div_",
    operator.floordiv: "floor_divide_",
    operator.pow: "pow_",
    operator.mod: "remainder_",
    operator.and_: "bitwise_and_",
    operator.or_: "bitwise_or_",
    operator.xor: "bitwise_xor_",
}
for _operation in _IN_PLACE:
    setattr(AskableProxy, f"__i{_operation.__name__.strip('_')}__", _augmented(_operation))

_SPECIAL = {"__setitem__", *(f"__i{operation.__name__.strip('_')}__" for operation in _IN_PLACE)}


def writes_into_operand(kind: str, target: Any) -> bool:
    """Whether a node of this kind is written `tensor[...] = y`, `tensor += y` or `tensor.add_(y)`."""
    if kind == "call_function":
        return target is operator.setitem
    plain = str(target).endswith("_") and not str(target).endswith("__")
    return kind == "call_method" and (plain or target in _SPECIAL)


def recording(name: str, constructor: Callable[..., Any], tracer: GraphTracer) -> Callable[..., Any]:
    """`constructor`, recorded as a node where one of its arguments is a proxy or it draws random numbers."""

    def construct(*args: Any, **kwargs: Any) -> Any:
        flat = [*args, *kwargs.values()]
        nested = [part for item in flat if isinstance(item, (tuple, list)) for part in item]
        if name in RANDOM or any(isinstance(item, Proxy) for item in (*flat, *nested)):
            return tracer.record(constructor, args, kwargs)
        return constructor(*args, **kwargs)

    return construct


@functools.lru_cache(maxsize=4096)
def _unpackings(code: CodeType) -> dict[int, int]:
    """Where a function takes a fixed number of items out of something, `a, b = x`: offset and number."""
    return {
        instruction.offset: instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname == "UNPACK_SEQUENCE"
    }


def unpack(proxy: Proxy, length: int) -> Iterator[Proxy]:
    """The proxy's items."""
    return (proxy[index] for index in range(length))  # type: ignore[index]


def recorded_autocast(tracer: GraphTracer) -> dict[str, Callable[..., Any]]:
    """Methods for `torch.autocast` that leave two nodes, so that the graph changes precision where the model
    does.
    """
    real = {name: getattr(torch.autocast, name) for name in ("__init__", "__enter__", "__exit__")}
    entered: list[Proxy] = []

    def init(
        self: Any,
        device_type: Any,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if tracer.asking:
            real["__init__"](self, device_type, dtype, enabled, cache_enabled)
        self.asked_for = (device_type, dtype, enabled, cache_enabled)

    def enter(self: Any) -> Any:
        if tracer.asking:
            return real["__enter__"](self)
        if not (arguments := getattr(self, "asked_for", None)):  # made before, for a decorator
            arguments = (self.device, self.fast_dtype, self._enabled, self._cache_enabled)
        entered.append(
            tracer.create_proxy("call_function", torch.amp.autocast_mode._enter_autocast, arguments, {})
        )
        return self

    def leave(self: Any, *error: Any) -> Any:
        if tracer.asking:
            return real["__exit__"](self, *error)
        tracer.create_proxy("call_function", torch.amp.autocast_mode._exit_autocast, (entered.pop(),), {})
        return None

    return {"__init__": init, "__enter__": enter, "__exit__": leave}


def restore_writes(graph: Graph, root: nn.Module, holds_tensor: Callable[[Node], bool]) -> None:
    """Turn `x = x + y` back into the `x += y` it was written as, where another name still reads `x`, or `x`
    is kept beyond this forward.

    Elsewhere nobody can tell the two apart, and an operation without side effects is easier to work with.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.meta.pop(AUGMENTED, False) and isinstance(node.args[0], Node):
            target = node.args[0]
            aliases = _aliases(target, root)
            read_later = any(order[user] > order[node] for alias in aliases for user in alias.users)
            kept = any(alias.op == "get_attr" for alias in aliases)
            if (read_later or kept) and holds_tensor(target):
                write_in_place(node)


def write_in_place(node: Node) -> None:
    """Record `x = x + y` as `x += y`."""
    node.op, node.target = "call_method", _IN_PLACE[node.target]
    node.meta.pop(AUGMENTED, None)


def _aliases(node: Node, root: nn.Module) -> set[Node]:
    """Nodes that may share memory with `node`: itself, what it is a view of, and views of any of these."""
    base = node
    while _may_share(base, root) and base.all_input_nodes:
        base = base.all_input_nodes[0]
    found, todo = {base}, [base]
    while todo:
        for user in todo.pop().users:
            if user not in found and _may_share(user, root):
                found.add(user)
                todo.append(user)
    return found


def _may_share(node: Node, root: nn.Module) -> bool:
    """Whether a node's value may be its operand or lie in its memory; yes in case of doubt."""
    if node.op == "call_module":
        return not isinstance(root.get_submodule(str(node.target)), _FRESH)
    return is_view(node) or changes_in_place(node, root) or _name(node) in _MAY_SHARE


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def constructors() -> dict[str, Callable[..., Any]]:
    """The functions of `CONSTRUCTORS` and `RANDOM` by name."""
    return {name: getattr(torch, name) for name in (*CONSTRUCTORS, *RANDOM)}
