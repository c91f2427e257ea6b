"""A second handle on a model: the same parameters and buffers, its own modes.

`shared_view(model)` rebuilds the module tree but keeps every tensor, and every dictionary that holds tensors.
So training one trains the other, `.to(device)` moves both, and `.train()`, `.eval()` or a new submodule in
the view never reach the original.
"""

from __future__ import annotations

from types import MethodType

import torch.fx
from torch import nn


def shared_view(module: nn.Module) -> nn.Module:
    """A module tree with the same classes, parameters, buffers and hooks as `module`, and with modes of its
    own.
    """
    return _view(module, {})


def _view(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    view = seen[id(module)] = module.__class__.__new__(module.__class__)
    view.__dict__.update(module.__dict__)
    view.__dict__["_modules"] = {
        name: child if child is None else _view(child, seen) for name, child in module._modules.items()
    }
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            view.__dict__[name] = MethodType(value.__func__, view)
        elif not name.startswith("_") and type(value) in (dict, list, set):
            view.__dict__[name] = value.copy()  # a cache that forward fills must not fill the original's
    if isinstance(view, torch.fx.GraphModule):
        view.recompile()  # its forward belongs to the instance
    return view


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and type(module).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner
