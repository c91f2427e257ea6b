"""How far the values of a graph reach, measured on images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Interpreter, Node

from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import evaluating, image_form, reference_tensor

BATCH = 8

MARGIN_MEASURED, MARGIN_GUESSED = 4.0, 16.0
"""How much further than on the calibration images, or than on random ones, a value is thought to reach."""

_PROBES = 8


@dataclass
class Reach:
    """What a node was seen to hold: the largest finite magnitude, its shape, whether it is a real number.

    For a node with several results, the first of them and the largest of all.
    """

    largest: float
    shape: tuple[int, ...]
    floating: bool
    rounding: float = 0.0
    """Of a product: what rounding its operands does to its result, relative, in the mean square."""


class _Measuring(Interpreter):
    def __init__(self, module: TracedModule, products: frozenset[str], dtype: torch.dtype) -> None:
        super().__init__(module)
        self.reach: dict[str, Reach] = {}
        self._products = products
        self._dtype = dtype

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            return value
        tensors = [x for x in (value if isinstance(value, (list, tuple)) else [value]) if torch.is_tensor(x)]
        if not tensors:
            return value
        floats = [x for x in tensors if x.is_floating_point()]
        first, found = tensors[0], self.reach.get(n.name)
        reach = Reach(max(map(_largest, floats), default=0.0), tuple(first.shape), first.is_floating_point())
        if n.name in self._products:
            reach.rounding = self._rounding(n, value)
        if found is not None:
            reach.largest = max(reach.largest, found.largest)
            reach.rounding = max(reach.rounding, found.rounding)
        self.reach[n.name] = reach
        return value

    def _rounding(self, n: Node, value: torch.Tensor) -> float:
        def rounded(x: Any) -> Any:
            real = torch.is_tensor(x) and x.is_floating_point()
            return x.to(self._dtype).to(x.dtype) if real else x

        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args, kwargs = torch.utils._pytree.tree_map(rounded, (args, kwargs))
        difference = (n.target(*args, **kwargs) - value).square().mean().sqrt()  # type: ignore[operator]
        scale = value.square().mean().sqrt()
        return float(difference / scale) if scale > 0 else 0.0


def measure(
    module: TracedModule,
    images: NDArray[Any],
    products: frozenset[str] = frozenset(),
    dtype: torch.dtype = torch.float16,
) -> dict[str, Reach]:
    """The reach of every tensor of the graph on `images` (B, C, H, W), by node.

    Args:
        products: nodes of which the rounding is measured as well, each in `dtype`.
    """
    measuring = _Measuring(module, products, dtype)
    device = reference_tensor(module).device
    with evaluating(module), torch.no_grad():
        for start in range(0, len(images), BATCH):
            measuring.run(torch.from_numpy(images[start : start + BATCH]).to(device))
    return measuring.reach


def random_images(module: TracedModule, count: int = _PROBES) -> NDArray[Any]:
    """What `module` takes, noise and as many images that are smooth: of mean 0 and deviation 1, or bytes."""
    random = np.random.default_rng(0)
    shape, dtype = image_form(module, module.info.need_input_size())
    images = random.standard_normal((count, *shape), dtype=np.float32)
    longest = sorted(range(3), key=lambda axis: -shape[axis])[:2]  # the two that are no channels
    for image in images[count // 2 :]:
        for axis in longest:
            image[:] = np.cumsum(image, axis)
        image -= image.mean()
        image /= image.std() + 1e-6
    return images if dtype.is_floating_point else np.clip(128 + 64 * images, 0, 255).astype(np.uint8)


def _largest(x: torch.Tensor) -> float:
    if not x.numel():
        return 0.0
    largest = float(x.abs().max())
    if not np.isfinite(largest):
        finite = x[torch.isfinite(x)]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
    return largest
