"""What can take a channel affine into its weights, and on which side.

behind a Linear, a convolution or a norm:   s * (W x + b) + t  = (s W) x + (s b + t)          W's rows are the
channels before a Linear:                            W (s * x + t) + b  = (W s) x + (b + W t)          W's
columns are before a convolution:                       the same, summed over the kernel; with zero padding
only for t = 0, since
                                            the padding is zero before the shift and t behind it
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from vmkd_fx.graph.edit import computes_as
from vmkd_fx.graph.receipt import PREFIX
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.fold.affine import ChannelAffine

_FUNCTIONS: dict[Any, tuple[str, int]] = {
    F.linear: ("linear", 1),
    F.layer_norm: ("layer_norm", 2),
    F.group_norm: ("group_norm", 2),
    **{
        function: ("conv", 1)
        for function in (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
    },
}
"""Functional form: kind, and where its weight stands among the arguments; the bias follows it."""


def scale_rows(
    weight: torch.Tensor | None, bias: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale * (W x + b) + shift` as a new W and b; a norm's weight is a W with one entry a row."""
    rows = torch.ones_like(scale) if weight is None else weight
    columns = (-1, *(1 for _ in rows.shape[1:]))
    return rows * scale.reshape(columns), shift if bias is None else bias * scale + shift


def scale_columns(
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor, groups: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """`W (scale * x + shift) + b` as a new W and b, for a Linear or a convolution kernel in groups."""
    rows, columns = weight.shape[:2]

    def for_each_row(vector: torch.Tensor) -> torch.Tensor:
        each = vector.reshape(groups, 1, columns).expand(groups, rows // groups, columns)
        return each.reshape(rows, columns, *(1 for _ in weight.shape[2:]))

    added = (weight * for_each_row(shift)).flatten(1).sum(1)
    return weight * for_each_row(scale), added if bias is None else bias + added


class Weights:
    """The weight and the bias of one node, wherever they live: in a module or as separate attributes."""

    def __init__(self, module: TracedModule, node: Node) -> None:
        self.module = module
        self.node = node
        self.layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        self.kind = self._kind()

    def _kind(self) -> str | None:
        if self.layer is not None:
            return self._module_kind(self.layer)
        if self.node.op != "call_function" or self.node.target not in _FUNCTIONS:
            return None
        kind, position = _FUNCTIONS[self.node.target]
        sources = [self._value(position + index, name) for index, name in enumerate(("weight", "bias"))]
        if not all(s is None or (isinstance(s, Node) and s.op == "get_attr") for s in sources):
            return None  # a weight that is computed is not ours to change
        return None if kind == "layer_norm" and self._normalised_length() is None else kind

    def _module_kind(self, layer: nn.Module) -> str | None:
        kinds: dict[str, tuple[type[nn.Module], ...]] = {
            "linear": (nn.Linear,),
            "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
            "group_norm": (nn.GroupNorm,),
            "layer_norm": (nn.LayerNorm,),
        }
        found = next(
            (name for name, types in kinds.items() if any(computes_as(layer, t) for t in types)), None
        )
        plain_norm = not isinstance(layer, nn.LayerNorm) or len(layer.normalized_shape) == 1
        return found if plain_norm else None

    def _normalised_length(self) -> int | None:
        """Channels of a functional LayerNorm over one axis of a known length."""
        shape = self._value(1, "normalized_shape")
        one = isinstance(shape, (tuple, list)) and len(shape) == 1 and isinstance(shape[0], int)
        return int(shape[0]) if one else None

    def _value(self, position: int, name: str) -> Any:
        return self.node.args[position] if len(self.node.args) > position else self.node.kwargs.get(name)

    def channel_axis(self, rank: int) -> int:
        """The axis of the output that the rows of the weight stand for."""
        return rank - 1 if self.kind in ("linear", "layer_norm") else 1

    def get(self, name: str) -> torch.Tensor | None:
        if self.layer is not None:
            value = getattr(self.layer, name)
            return None if value is None else value.detach()
        source = self._argument(name)
        return None if source is None else _attribute(self.module, str(source.target)).detach()

    def set(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Install new parameters of the dtype the old ones had."""
        for name, value in (("weight", weight), ("bias", bias)):
            parameter = nn.Parameter(value.contiguous().to(self._reference()), requires_grad=False)
            if self.layer is not None:
                setattr(self.layer, name, parameter)
            else:
                self._set_argument(name, parameter)

    def uses(self, counts: Counter[int]) -> int:
        """How many nodes read the weight or the bias, or call the module that would hold them."""
        return max([1, counts[id(self.layer)], *(counts[id(tensor)] for tensor in self._tensors())])

    def groups(self) -> int:
        """Groups of a convolution; a Linear is one."""
        return self._conv_setting("groups", 1) if self.kind == "conv" else 1

    def pads_with_zeros(self) -> bool:
        """Whether it reads values that no affine before it has touched."""
        padding = self._conv_setting("padding", 0) if self.kind == "conv" else 0
        if isinstance(padding, (tuple, list)):
            return any(padding)
        return padding not in (0, "valid")

    def _conv_setting(self, name: str, default: Any) -> Any:
        if self.layer is not None:
            return getattr(self.layer, name)
        order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        value = self._value(order.index(name), name)
        return default if value is None else value

    def _tensors(self) -> list[torch.Tensor]:
        if self.layer is not None:
            return list(self.layer.parameters(recurse=False))
        sources = (self._argument(name) for name in ("weight", "bias"))
        return [_attribute(self.module, str(source.target)) for source in sources if source is not None]

    def _reference(self) -> torch.Tensor:
        tensors = self._tensors() or list(self.module.parameters())
        return tensors[0]

    def _position(self, name: str) -> int:
        return _FUNCTIONS[self.node.target][1] + (name == "bias")

    def _argument(self, name: str) -> Node | None:
        value = self._value(self._position(name), name)
        return value if isinstance(value, Node) else None

    def _set_argument(self, name: str, parameter: nn.Parameter) -> None:
        path = f"{PREFIX}.folded.{self.node.name}"
        if path not in dict(self.module.named_modules()):
            self.module.add_submodule(path, nn.Module())
        self.module.get_submodule(path).register_parameter(name, parameter)
        with self.module.graph.inserting_before(self.node):
            source = self.module.graph.get_attr(f"{path}.{name}")
        position = self._position(name)
        if len(self.node.args) > position:
            self.node.update_arg(position, source)
        else:
            self.node.update_kwarg(name, source)


def absorb_behind(weights: Weights, affine: ChannelAffine, rank: int, counts: Counter[int]) -> str | None:
    """Let the producer of `affine.base` take the affine; returns the reason if it cannot."""
    name = weights.node.name
    if weights.kind is None:
        return f"{name} before it has no weight that could take it"
    if affine.axis not in (None, weights.channel_axis(rank)):
        return f"the channels of {name} are on another axis"
    if weights.uses(counts) > 1:
        return f"the weights of {name} are used {weights.uses(counts)} times"
    channels = _output_channels(weights)
    if channels is None:
        return f"{name} does not say how many channels it has"
    weights.set(*scale_rows(weights.get("weight"), weights.get("bias"), *_vectors(affine, channels, weights)))
    return None


def absorb_before(weights: Weights, affine: ChannelAffine, rank: int, counts: Counter[int]) -> str | None:
    """Let the consumer of the affine take it; returns the reason if it cannot."""
    name = weights.node.name
    weight = weights.get("weight") if weights.kind in ("linear", "conv") else None
    if weight is None:
        return f"{name} behind it has no matrix that could take it"
    if affine.axis not in (None, weights.channel_axis(rank)):
        return f"{name} multiplies another axis"
    if weights.uses(counts) > 1:
        return f"the weights of {name} are used {weights.uses(counts)} times"
    if weights.pads_with_zeros() and bool(affine.shift.any()):
        return f"{name} pads with zeros, which a shift would have to move"
    groups = weights.groups()
    vectors = _vectors(affine, weight.shape[1] * groups, weights)
    weights.set(*scale_columns(weight, weights.get("bias"), *vectors, groups))
    return None


def parameter_uses(module: TracedModule) -> Counter[int]:
    """How many nodes read each parameter."""
    counts: Counter[int] = Counter()
    for node in module.graph.nodes:
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            counts.update(id(held) for held in (called, *called.parameters()))
        elif node.op == "get_attr":
            counts[id(_attribute(module, str(node.target)))] += len(node.users)
    return counts


def _vectors(affine: ChannelAffine, channels: int, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    reference = weights._reference()
    scale, shift = (
        (v.expand(channels) if v.ndim == 0 else v).to(reference) for v in (affine.scale, affine.shift)
    )
    return scale, shift


def _output_channels(weights: Weights) -> int | None:
    weight = weights.get("weight")
    if weight is not None:
        return weight.shape[0]
    if isinstance(weights.layer, nn.GroupNorm):
        return weights.layer.num_channels
    if isinstance(weights.layer, nn.LayerNorm):
        return weights.layer.normalized_shape[0]
    return weights._normalised_length() if weights.kind == "layer_norm" else None


def _attribute(module: TracedModule, path: str) -> torch.Tensor:
    holder, _, name = path.rpartition(".")
    return getattr(module.get_submodule(holder), name)
