"""What the nodes of a graph hold for images of one size, found on demand and without arithmetic.

Shapes, lengths and flags are exact; tensors are fake, for their numbers are not known while tracing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from vmkd_fx.frames import Frames
from vmkd_fx.graph.rules import Sized, function_rule, method_rule, module_rule, sized

_SCOPES = (_enter_autocast, _exit_autocast)


_LAYOUT = {"stride", "is_contiguous", "storage_offset"}
"""Questions about how a tensor lies in memory, which no shape answers."""


class NodeValues:
    """Values of nodes under `root` for a batch of images; each node is computed once, when it is asked for.

    Tensors are `Sized`: shape, dtype, device.

    Args:
        root: the module whose parameters and submodules the nodes name.
        size: (B, C, H, W) of the images, also where the module takes frames in another layout.
        constants: tensors that nodes name and `root` does not hold, by path.
        rules: whether to find the shapes of common operations by formula; torch finds the same, later.
    """

    def __init__(
        self,
        root: nn.Module,
        size: tuple[int, ...],
        constants: Mapping[str, torch.Tensor] | None = None,
        *,
        rules: bool = True,
    ) -> None:
        reference = reference_tensor(root)
        self.root = root
        self.known: dict[Node, Any] = {}
        self._fakes: dict[Node, Any] = {}
        self._size = size
        self._constants = {} if constants is None else constants
        self._rules = rules
        self._device = reference.device
        self._shape, self._dtype = image_form(root, size[1:])
        self._mode: Any = (
            contextlib.nullcontext()
            if reference.device.type == "meta"
            else FakeTensorMode(allow_non_fake_inputs=True)
        )

    def of(self, node: Node) -> Any:
        """The value of `node`.

        Raises:
            Exception: whatever the operations of the model raise for such images.
        """
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [source for source in current.all_input_nodes if source not in self.known]
            if missing:
                pending += missing
                continue
            if current not in self.known:
                self.known[current] = self._compute(current)
            pending.pop()
        return self.known[node]

    def _compute(self, node: Node) -> Any:
        if node.op == "placeholder":
            if node.prev.op == "placeholder":
                raise ValueError(f"only images have a known size, and {node.name!r} is another input")
            return Sized(torch.Size((self._size[0], *self._shape)), self._dtype, self._device)
        if node.op == "get_attr":
            return self._keep(node, self._attribute(str(node.target)))
        if node.target in _SCOPES:
            return None  # a precision decides no length, and would stay switched on
        if node.op == "call_method" and node.target in _LAYOUT and self._rules:
            return NodeValues(self.root, self._size, self._constants, rules=False).of(node)
        if self._rules and (value := self._by_rule(node)) is not None:
            return value
        with self._mode, _quiet():
            args: Any = map_arg(node.args, self._fake)
            kwargs: Any = map_arg(node.kwargs, self._fake)
            return self._keep(node, self._run(node, args, kwargs))

    def _by_rule(self, node: Node) -> Any:
        args: Any = map_arg(node.args, self.known.__getitem__)
        kwargs: Any = map_arg(node.kwargs, self.known.__getitem__)
        if node.op == "call_module":
            return module_rule(self.root.get_submodule(str(node.target)), args, kwargs)
        if node.op == "call_method":
            return method_rule(str(node.target), args, kwargs)
        return function_rule(node.target, args, kwargs) if node.op == "call_function" else None

    def _run(self, node: Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            with evaluating(self.root.get_submodule(str(node.target))) as module:
                return module(*args, **kwargs)
        if node.op == "call_method":
            if isinstance(args[0], nn.Module):
                with evaluating(args[0]) as module:
                    return getattr(module, str(node.target))(*args[1:], **kwargs)
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        return args[0]

    def _keep(self, node: Node, value: Any) -> Any:
        """Keep what torch computed, for what is computed from it, and return what is known of it."""
        self._fakes[node] = value
        return tree_map_only(torch.Tensor, sized, value)

    def _fake(self, node: Node) -> Any:
        if node not in self._fakes:
            self._fakes[node] = tree_map_only(Sized, _empty, self.known[node])
        return self._fakes[node]

    def _attribute(self, path: str) -> Any:
        return self._constants[path] if path in self._constants else attribute(self.root, path)


def attribute(root: nn.Module, path: str) -> Any:
    """What a `get_attr` node of this target reads under `root`."""
    parent, _, name = path.rpartition(".")
    return getattr(root.get_submodule(parent), name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch prints a stack for each operation that does not take its operands, and raises besides."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _empty(x: Sized) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def reference_tensor(module: nn.Module) -> torch.Tensor:
    """A tensor of the dtype and on the device that the module's images have: its first real parameter."""
    return next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))


def image_form(module: nn.Module, size: tuple[int, ...]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape, without the batch, and dtype of what `module` takes for images of size (C, H, W)."""
    frames = getattr(getattr(module, "info", None), "frames", None)
    if isinstance(frames, Frames):
        return frames.shape(size), torch.uint8
    return size, reference_tensor(module).dtype


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """`module` in eval mode for a while; afterwards every part has the mode that it had."""
    modes = {part: part.training for part in module.modules()}
    for part in modes:
        part.training = False
    try:
        yield module
    finally:
        for part, mode in modes.items():
            part.training = mode
