"""A second handle on a model: the same parameters and buffers, its own modes.

`shared_view(model)` rebuilds the module tree but keeps every tensor, and every dictionary that holds tensors.
So training one trains the other, `.to(device)` moves both, and `.train()`, `.eval()` or a new submodule in
the view never reach the original.
"""

from __future__ import annotations

from copy import copy
from types import MethodType
from typing import Any

import torch.fx
from torch import nn

INTERNAL = frozenset(vars(nn.Module()))
"""Attributes in which every module keeps its tensors, children and hooks."""

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "ModelEmaV2", "ModelEmaV3")


def shared_view(module: nn.Module, *, throwaway: bool = False) -> nn.Module:
    """A module tree with the same classes, parameters, buffers and hooks as `module`, and with modes of its
    own.

    A `throwaway` view has the dictionaries of tensors for itself too, so that a forward may assign to a
    buffer.
    """
    seen: dict[int, nn.Module] = {}
    view = _view(module, seen)
    for part in seen.values():
        _own_attributes(part, seen)
    if throwaway:
        for part in view.modules():
            part.__dict__.update({name: dict(part.__dict__[name]) for name in ("_parameters", "_buffers")})
    return view


def _view(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    view = seen[id(module)] = module.__class__.__new__(module.__class__)
    view.__dict__.update(module.__dict__)
    view.__dict__["_modules"] = {
        name: child if child is None else _view(child, seen) for name, child in module._modules.items()
    }
    return view


def _own_attributes(view: nn.Module, seen: dict[int, nn.Module]) -> None:
    """Let what a part holds besides tensors and children point into the view, and be its own.

    A cache that forward fills must not fill the original's.
    """
    for name, value in view.__dict__.items():
        if name not in INTERNAL:
            view.__dict__[name] = _own(value, seen, {})
    if isinstance(view, torch.fx.GraphModule):
        view.recompile()  # its forward belongs to the instance


def _own(value: Any, seen: dict[int, nn.Module], copies: dict[int, Any]) -> Any:
    if isinstance(value, nn.Module):
        return seen.get(id(value), value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, seen.get(id(value.__self__), value.__self__))
    if id(value) in copies:
        return copies[id(value)]
    if type(value) is tuple:
        return tuple(_own(item, seen, copies) for item in value)
    if isinstance(value, (dict, list)) and type(value).__module__ in ("builtins", "collections"):
        own = copies[id(value)] = copy(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            own[key] = _own(item, seen, copies)
        return own
    return value.copy() if type(value) is set else value


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of data parallelism, torch.compile and averaged weights."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and type(module).__name__ in _WRAPPERS:
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner
