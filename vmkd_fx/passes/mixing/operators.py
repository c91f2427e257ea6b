"""Circulant mixers, global filters and their products of spectra as operators of torch, one node each.

torch.export opens functions and modules; an operator it keeps. So the choice of a realisation can wait until
the graph is in its normal form. The operators infer only: training goes on through `circulant` and
`global_filter`, whose gradients torch knows.

They are registered where this module is imported, once a process, as torch asks for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.models import global_filter as filters
from vmkd_fx.models.involution import involve, involve_unfolded
from vmkd_fx.passes import circulant_mixer as mixers


@torch.library.custom_op("vmkd::circulant", mutates_args=())
def circulant(x: Tensor, weight: Tensor) -> Tensor:
    """CCS Eq. 8: x (B, N, C) and weight (G, N) to (B, N, C)."""
    return mixers.circulant(x, weight).contiguous()


@torch.library.custom_op("vmkd::global_filter", mutates_args=())
def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """GFNet's filter: x (B, H, W, C) and weight (H, W // 2 + 1, C, 2) to (B, H, W, C)."""
    return filters.global_filter(x, weight).contiguous()


@torch.library.custom_op("vmkd::dft_filter", mutates_args=())
def dft_filter(x: Tensor, direct: Tensor, crossed: Tensor) -> Tensor:
    """Filter maps by their one-sided spectrum, as an engine with a DFT does it.

        X = rfft(x)    Y = direct * X + crossed * (X with re and im exchanged)    y = Re(ifft(Y, padded by 0))

    Args:
        x: (B, N, C) or (B, H, W, C).
        direct: (..., C, 2), re and im last, on the one-sided grid. Frequencies that stand for their
            conjugates too count twice, because the inverse does not add those.
        crossed: of the same shape.

    Returns:
        Maps of the shape of x.
    """
    axes = tuple(range(1, x.ndim - 1))
    dtype = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.view_as_real(torch.fft.rfftn(x.to(dtype), dim=axes))
    mixed = torch.view_as_complex(spectrum * direct + spectrum.flip(-1) * crossed)
    for axis in axes:
        mixed = torch.fft.ifft(mixed, n=x.shape[axis], dim=axis)
    return mixed.real.to(x.dtype).contiguous()


@circulant.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@global_filter.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@dft_filter.register_fake
def _(x: Tensor, direct: Tensor, crossed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def keep_whole(module: TracedModule) -> None:
    """Let the mixers of a traced graph be what the passes know, in place.

    A `CirculantMixer` becomes a call on its input and its weight, which keeps its name; a call of
    `global_filter` becomes one on the same arguments, and an involution one on an unfolded copy of its input.
    Nothing else in the graph changes.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(
            module.get_submodule(str(node.target)), mixers.CirculantMixer
        ):
            with graph.inserting_before(node):
                weight = graph.get_attr(f"{node.target}.weight")
            _put(node, torch.ops.vmkd.circulant.default, _argument(node, 0, "x"), weight)
        elif node.op == "call_function" and node.target is filters.global_filter:
            x, weight = _argument(node, 0, "x"), _argument(node, 1, "weight")
            _put(node, torch.ops.vmkd.global_filter.default, x, weight)
        elif node.op == "call_function" and node.target is involve:
            node.target = involve_unfolded
            node.meta.pop("is_wrapped", None)
    graph.lint()
    module.recompile()


def _argument(node: Node, place: int, name: str) -> Node:
    value = node.args[place] if place < len(node.args) else node.kwargs[name]
    assert isinstance(value, Node)
    return value


def _put(node: Node, operator: object, x: Node, weight: Node) -> None:
    """A call of `operator` in the place of `node`."""
    with node.graph.inserting_before(node):
        call = node.graph.call_function(operator, (x, weight))  # type: ignore[arg-type]
    # The generated code would ask torch.fx to wrap a function of this name, and there is none.
    call.meta.update({key: value for key, value in node.meta.items() if key != "is_wrapped"})
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)
