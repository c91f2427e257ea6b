"""The tracer: torch.fx's, with layers as leaves, shapes that can be asked for and every call written down."""

from __future__ import annotations

import contextlib
import inspect
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.fx
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import nn
from torch.fx import Graph, Node, Proxy
from torch.utils._pytree import tree_map_only

from vmkd_fx.errors import TraceError
from vmkd_fx.graph.constants import (
    CONSTANTS,
    constants_of,
    install_constant,
    plain_tensors,
    same_tensor,
)
from vmkd_fx.graph.nodes import METHOD
from vmkd_fx.graph.proxy import (
    AUGMENTED,
    AskableParameter,
    AskableProxy,
    constructors,
    recorded_autocast,
    recording,
    restore_writes,
    unpack,
    write_in_place,
    writes_into_operand,
)
from vmkd_fx.graph.receipt import PREFIX
from vmkd_fx.graph.rules import Sized
from vmkd_fx.graph.traced import Call
from vmkd_fx.graph.values import NodeValues

_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
)
TOOLS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
"""How the files begin that run a model and are not its own code."""

_MORE_IMAGES, _LARGER_IMAGES = 1, 2


def _numbers(value: Any) -> Any:
    """A value without its tensors, of which only the place remains."""
    return tree_map_only(Sized, lambda _: None, value)


class GraphTracer(torch.fx.Tracer):
    """Traces one module tree.

    Arguments of forward with a default keep it, so that only images are an input. Where Python's control flow
    depends on shapes, it follows images of `size`, and must go the same way for two and for three of them.

    Args:
        closed: paths of modules to keep as one node each, or of methods of modules that others call,
            `rope.get_embed` say.
        size: (C, H, W) of one image; None where it is not known.
        constants: tensors that forward made up, by name, shared between the traces of one model.

    Attributes:
        failed_in: after a failure, the path of the innermost module that was being traced.
        calls: of the modules that were opened, by path, in order.
        asking: whether values are being looked up, so that nothing is to be recorded.
        fixed_by: where Python's control flow depended on the images' height or width, in words.
    """

    def __init__(
        self,
        closed: Iterable[str] = (),
        size: tuple[int, ...] | None = None,
        constants: dict[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(autowrap_functions=tuple(f for f in get_notrace_functions() if callable(f)))
        self.closed = frozenset(closed)
        self.size = size
        self.constants: dict[str, torch.Tensor] = {} if constants is None else constants
        self.failed_in: str | None = None
        self.calls: dict[str, list[Call]] = {}
        self.fixed_by: dict[str, None] = {}
        self._layers = tuple(kind for kind in get_notrace_modules() if issubclass(kind, _LAYERS))
        self._names: dict[int, str] | None = None
        self._made: Counter[str] = Counter()
        self._plain: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._kept: list[torch.Tensor] = []
        self._scope = _scope()
        self._running: list[str] = [""]
        self._values: tuple[NodeValues, ...] = ()
        self._refused: set[int] = set()
        self.asking = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        if self.size is not None:
            channels, height, width = self.size
            sizes = ((2, *self.size), (3, *self.size), (2, channels, 8 * height, 8 * width))
            self._values = tuple(NodeValues(root, size, self.constants) for size in sizes)
        self.constants.update(constants_of(root))
        self._plain = {
            id(tensor): (tensor, tensor._version, tensor.detach().clone()) for tensor in plain_tensors(root)
        }
        hooked = root._forward_hooks or root._forward_pre_hooks or "forward" in vars(root)
        self.traced_func_name = "_call_impl" if hooked else "forward"
        with contextlib.ExitStack() as patches:
            for module, name in _methods(root, self.closed):
                patches.enter_context(patch.object(module, name, self._recorded(root, module, name)))
            for name, constructor in constructors().items():
                patches.enter_context(patch.object(torch, name, recording(name, constructor, self)))
            for name, method in recorded_autocast(self).items():
                patches.enter_context(patch.object(torch.autocast, name, method))
            patches.enter_context(patch.object(nn.Module, "__setattr__", self._assign))
            random = torch.get_rng_state()
            try:
                graph = super().trace(root, concrete_args)
                _refuse_drawn(random)
                self._refuse_kept()
            finally:
                torch.set_rng_state(random)
        restore_writes(graph, root, self._holds_tensor)
        for path, value in self.constants.items():
            install_constant(root, path, value)
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A layer of torch.nn or timm, or what was closed."""
        return module_qualified_name in self.closed or self.is_layer(m)

    def is_layer(self, module: nn.Module) -> bool:
        """Whether a module is one operation, wherever it stands; ours say so by `stays_closed`."""
        stays_closed = bool(getattr(type(module), "stays_closed", False))
        return stays_closed or isinstance(module, self._layers) or super().is_leaf_module(module, "")

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.asking:
            return forward(*args, **kwargs)
        random = torch.get_rng_state()
        path = self.path_of_module(m)
        self._running.append(self._running[-1] if self.is_leaf_module(m, path) else path)
        try:
            result = super().call_module(m, forward, args, kwargs)
            _refuse_drawn(random)
            self._refuse_kept()
        except Exception:
            torch.set_rng_state(random)
            if self.failed_in is None and not self.is_leaf_module(m, path):  # closing a leaf mends nothing
                self.failed_in = path
            raise
        finally:
            self._running.pop()
        if not self.is_leaf_module(m, path):
            self.calls.setdefault(path, []).append(Call(_names_in((args, kwargs)), _names_in(result)))
        return result

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Node:
        if (scope := _scope()) != self._scope:
            raise TraceError(f"{target} runs under {scope}, which a graph does not record")
        if target is torch._assert and len(args) == 2:  # while tracing, a message has no value to name
            args = (args[0], re.sub(r" ?\(?Proxy\([^()]*\)\)?", "", str(args[1])))
        node = super().create_node(kind, target, args, kwargs, *rest, **named)
        if method := self._method():
            node.meta[METHOD] = method
        return node

    def _method(self) -> str:
        """The path of the other module's method that a forward is running; "" in forward itself."""
        found, running = "", self._running[-1]
        frame = inspect.currentframe()
        while frame is not None:
            code = frame.f_code
            caller = frame.f_locals.get("self") if code.co_varnames[:1] == ("self",) else None
            if isinstance(caller, nn.Module):
                path = (self.submodule_paths or {}).get(caller, "")
                if path == running:
                    return found
                found = f"{path}.{code.co_name}"
            frame = frame.f_back
        return found

    def _recorded(self, root: nn.Module, module: nn.Module, name: str) -> Callable[..., Any]:
        """A module's method, recorded as a node that calls it."""
        method, path = getattr(module, name), next(p for p, part in root.named_modules() if part is module)

        def record(*args: Any, **kwargs: Any) -> Any:
            if self.asking:
                return method(*args, **kwargs)
            owner = self.create_proxy("get_attr", path, (), {})
            return self.create_proxy("call_method", name, (owner, *args), kwargs)

        return record

    def create_proxy(self, kind: str, target: Any, args: Any, *rest: Any, **named: Any) -> Any:
        if writes_into_operand(kind, target) and isinstance(args[0], torch.Tensor):
            raise TraceError(
                "the forward writes data into a tensor that does not come from the images, and may read it "
                "unseen afterwards; x.new_zeros(...) makes one that a graph follows"
            )
        return super().create_proxy(kind, target, args, *rest, **named)

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A node that calls `function`; its value while one is being asked for."""
        if self.asking:
            return function(*args, **kwargs)
        return self.create_proxy("call_function", function, args, kwargs)

    def proxy(self, node: Node) -> Proxy:
        return AskableProxy(node, self)

    def ask(self, node: Node) -> Any:
        """What `node` holds for the model's images, for Python to decide by.

        Raises:
            TraceError: that is data, or depends on the number of images, or the images' size is not known.
        """
        if not self._values:
            raise TraceError(
                f"{node.name!r} decides, and how large the images are is not known; "
                "trace(model, input_size=(3, 224, 224)) says it"
            )
        value = self._value(node)
        if isinstance(value, Sized):
            raise TraceError(f"the forward decides by the data in {node.name!r}, which a graph cannot")
        if self._varies(node, _MORE_IMAGES):
            raise TraceError(f"the forward decides by the number of images, here {node.name!r}")
        if self._varies(node, _LARGER_IMAGES):
            self._hold_size()
        return value

    def length(self, node: Node) -> int:
        """The number of items in `node`, for Python to decide by; errors as for `ask`."""
        value = self._value(node)
        if isinstance(value, Sized):
            return int(self.ask(self.create_node("call_method", "size", (node, 0), {})))
        if self._differs(node, _MORE_IMAGES, len):
            raise TraceError(f"the forward decides by the number of images, here {node.name!r}")
        if self._differs(node, _LARGER_IMAGES, len):
            self._hold_size()
        return len(value)

    def _value(self, node: Node, which: int = 0) -> Any:
        self.asking = True
        try:
            return self._values[which].of(node)
        finally:
            self.asking = False

    def _hold_size(self) -> None:
        self.fixed_by[f"{self.scope.module_path or 'forward'} ({_line()})"] = None

    def to_bool(self, obj: Proxy) -> bool:
        return bool(self.ask(obj.node))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        return unpack(obj, self.length(obj.node))

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        parameters = list(inspect.signature(self.root.forward).parameters.values())
        positional = [p for p in parameters if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
        inputs = [p for p in positional if p.default is p.empty] or positional[:1]
        return root_fn, [self.root, *(self.create_proxy("placeholder", p.name, (), {}) for p in inputs)]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if self.asking or not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self._tensor_names().get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            make = (
                (lambda node: AskableParameter(self, node, name, attr_val))
                if isinstance(attr_val, nn.Parameter)
                else None
            )
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=make)
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

        The name is its place among those of its module, so that two traces of one model agree; another value
        takes another name.
        """
        place = (self.scope.module_path or "root").replace(".", "_")
        path = f"{PREFIX}.{CONSTANTS}.{place}_{self._made[place]}"
        self._made[place] += 1
        while (other := self.constants.get(path)) is not None and not same_tensor(other, value):
            path += "_"
        self.constants[path] = value.detach()
        self._tensor_names()[id(value)] = path
        self._kept.append(value)  # an identity is good for as long as the tensor lives
        return path

    def _refuse_kept(self) -> None:
        """Refuse what forward has just written into plain tensors of the modules, and take it back.

        torch.fx does not see it: these tensors are no buffers.
        """
        for tensor, version, value in self._plain.values():
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)
                self._plain[id(tensor)] = (tensor, tensor._version, value)
                raise TraceError("the forward keeps what it computed in a tensor that is no buffer")

    @property
    def _assign(self) -> Callable[[nn.Module, str, Any], None]:
        """`nn.Module.__setattr__` for a buffer that forward replaces by what it computed."""
        original = nn.Module.__setattr__

        def assign(module: nn.Module, name: str, value: Any) -> None:
            if name not in module._buffers:
                if name in vars(module) and self._remembers_plainly(vars(module)[name], value):
                    raise TraceError(f"the forward keeps what it computed in the tensor {name!r}, no buffer")
                return original(module, name, value)
            if not isinstance(value, Proxy):
                return original(module, name, value)
            own = self._tensor_names().get(id(module._buffers[name]))
            target = value.node.args[0] if value.node.args else None
            if value.node.meta.get(AUGMENTED) and isinstance(target, Node) and target.target == own:
                return write_in_place(value.node)
            if self._remembers(value.node, own):
                raise TraceError(f"the forward keeps what it computed from data in the buffer {name!r}")
            del module._buffers[name]
            module.__dict__[name] = value
            return None

        return assign

    def _remembers_plainly(self, present: Any, value: Any) -> bool:
        """Whether a plain attribute becomes another value of the same shape, as a state does.

        What is kept for looking at, an attention map say, has a row for each image.
        """
        if not isinstance(present, torch.Tensor):
            return False
        if isinstance(value, torch.Tensor):
            return present.shape == value.shape and not same_tensor(present, value)
        if not isinstance(value, Proxy) or not self._holds_tensor(value.node):
            return False
        shapes = {self._value(value.node, which).shape for which in (0, _MORE_IMAGES)}
        return shapes == {present.shape} and self._remembers(value.node, None)

    def _remembers(self, node: Node, own: str | None) -> bool:
        """Whether a value depends on the images' data, or on the buffer `own` that it goes into."""
        todo, seen = [node], {node}
        while todo:
            current = todo.pop()
            if current.op == "placeholder" or (current.op == "get_attr" and current.target == own):
                return True
            if not self._holds_tensor(current):
                continue  # a number, which comes from the shape of what it was read off
            fresh = set(current.all_input_nodes) - seen
            seen |= fresh
            todo += fresh
        return False

    def _varies(self, node: Node, which: int) -> bool:
        """Whether a number goes back to a length that is another for the images of `which`.

        That it has the same value there is not enough: `height > 8` does too.
        """
        todo, seen = [node], {node}
        while todo:
            current = todo.pop()
            if self._reads_length(current):
                if self._differs(current, which):
                    return True
                continue
            fresh = set(current.all_input_nodes) - seen
            seen |= fresh
            todo += fresh
        return False

    def _reads_length(self, node: Node) -> bool:
        """Whether a node holds lengths of a tensor, or one of these: `x.shape`, `x.size(1)`, `x.shape[1]`."""
        sources = node.all_input_nodes
        if node.target is operator.getitem and len(sources) == 1 and not self._holds_tensor(sources[0]):
            return self._reads_length(sources[0])
        return any(self._holds_tensor(source) for source in sources)

    def _differs(self, node: Node, which: int, read: Callable[[Any], Any] = _numbers) -> bool:
        """Whether what is read off a node's value is another for the images of `which`."""
        if which in self._refused:
            return True
        value = read(self._value(node))
        try:
            return bool(value != read(self._value(node, which)))
        except Exception:  # the model takes no such images
            self._refused.add(which)
            return True

    def _holds_tensor(self, node: Node) -> bool:
        self.asking = True
        try:
            return bool(self._values) and isinstance(self._values[0].of(node), Sized)
        except Exception:
            return True
        finally:
            self.asking = False


def _methods(root: nn.Module, paths: Iterable[str]) -> Iterator[tuple[nn.Module, str]]:
    """Those of `paths` that are a module's methods: module and name."""
    modules = dict(root.named_modules())
    for path in paths:
        parent, _, name = path.rpartition(".")
        if path not in modules and parent in modules:
            yield modules[parent], name


def _refuse_drawn(before: torch.Tensor) -> None:
    """Refuse random numbers that were drawn while tracing: a graph would hold them as constants."""
    if not torch.equal(torch.get_rng_state(), before):
        raise TraceError("the forward draws random numbers that no operation on the images stands for")


def _names_in(value: Any) -> tuple[str, ...]:
    """Names of the nodes of all proxies in nested lists, in order."""
    if isinstance(value, Proxy):
        return (value.node.name,)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return tuple(name for item in items for name in _names_in(item))


def _line() -> str:
    """The line of the model's own code that is being run, as file:line."""
    frame = inspect.currentframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(TOOLS):
            return f"{file.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _scope() -> str:
    """What `with` blocks of torch are in force, which decides what an operation does and leaves no node."""
    gradients = "grad" if torch.is_grad_enabled() else "no_grad"
    return f"{gradients}, autocast {torch.is_autocast_enabled('cpu')}, {torch.is_autocast_enabled('cuda')}"
