"""Tensors that a forward has from elsewhere than the images, its parameters and its buffers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from vmkd_fx.graph.receipt import PREFIX
from vmkd_fx.graph.share import INTERNAL

CONSTANTS = "constants"


class Constants(nn.Module):
    """Holds tensors that forward makes up. They move with the model, and keep the dtype that forward gives
    them whatever the model's is.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Constants:
        dtypes = {name: value.dtype for name, value in self._buffers.items() if value is not None}
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != dtype:
                self._buffers[name] = before[name].to(moved.device)  # type: ignore[union-attr]
        return self


def install_constant(root: nn.Module, path: str, value: torch.Tensor) -> None:
    """Put a tensor that forward made up where the graph looks for it, outside the state dict."""
    *_, name = path.split(".")
    reserved = root._modules.setdefault(PREFIX, nn.Module())
    assert reserved is not None
    holder = reserved._modules.setdefault(CONSTANTS, Constants())
    assert holder is not None
    holder.register_buffer(name, value, persistent=False)


def constants_of(root: nn.Module) -> dict[str, torch.Tensor]:
    """The constants that a traced module holds already, by path."""
    prefix = f"{PREFIX}.{CONSTANTS}."
    return {path: value for path, value in root.named_buffers() if path.startswith(prefix)}


def plain_tensors(root: nn.Module) -> list[torch.Tensor]:
    """Tensors that modules keep as plain attributes, or in lists and dictionaries."""
    held = [value for part in root.modules() for name, value in vars(part).items() if name not in INTERNAL]
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor) and not leaf.is_inference()]


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same shape, dtype, device and values; of tensors on meta no more can be said."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.is_meta or torch.equal(one, other)
