"""Where two graphs begin to differ: the first node of one name in both whose value is another.

A pass may rightly change a value on the way (a scale that moved behind a reshape), so a difference counts
only if it reaches the result: the search goes back from the output and stops wherever both graphs agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from vmkd_fx.errors import ModelError
from vmkd_fx.graph.functional import writes
from vmkd_fx.graph.in_double import name_double_
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import evaluating, reference_tensor
from vmkd_fx.graph.verify import TOLERANCE, probe_images, relative_error
from vmkd_fx.passes.evaluation import specialise_to_evaluation

Values = dict[str, list[torch.Tensor]]
RESULT = "output"


@dataclass(frozen=True)
class Difference:
    """The first difference between two graphs that reaches their result.

    Attributes:
        node: of this name in both graphs; "output" where all nodes before it are of one graph alone.
        error: largest absolute difference of its value over the largest absolute value.
        bound: that `error` was held to.
        made_by: nodes of the second graph alone that it is computed with, in order.
        agreeing: the nodes in front of those, which hold the same in both graphs.
        readers: the nodes of the second graph that read it.
        result: the error of the result.
    """

    node: str
    error: float
    bound: float
    made_by: tuple[str, ...]
    agreeing: tuple[str, ...]
    readers: tuple[str, ...]
    result: float

    def __str__(self) -> str:
        lines = [
            f"{self.node} is the first that differs: {self.error:.3g} relative, {self.bound:.3g} is allowed"
        ]
        around = (("made by", self.made_by), ("from", self.agreeing), ("read by", self.readers))
        lines += [f"  {word} {', '.join(names)}" for word, names in around if names]
        return "\n".join((*lines, f"  the result differs by {self.result:.3g}"))


@torch.no_grad()
def bisect_graphs(
    before: GraphModule, after: GraphModule, images: torch.Tensor | None = None
) -> Difference | None:
    """The first node whose value differs between two graphs, of the names that both have; None if they agree.

    Both are run in float64 with the weights that they have (behind a fresh head of zeros nothing can be
    seen), and all shared values are held at once. A value may differ by 1e-12, or by a hundred times what one
    unit in the last place of every weight makes of it.

    Args:
        before, after: graphs of ATen operators; a traced module that is none yet becomes one.
        images: (B, C, H, W); random ones by default, for which `before` must say their size.

    Raises:
        ModelError: no images are given and `before` does not say their size, or one graph takes frames that
            the other does not.
        TraceError: a traced module has no graph of ATen operators.
    """
    if images is None and not isinstance(before, TracedModule):
        raise ModelError(
            "what is compared does not say how large its images are: bisect_graphs(..., images=x)"
        )
    _refuse_other_input(before, after)
    images = probe_images(before) if images is None else images  # type: ignore[arg-type]
    images = images.double() if images.is_floating_point() else images
    precision = max(torch.finfo(reference_tensor(module).dtype).eps for module in (before, after))
    one, other = _in_double(before), _in_double(after)
    shared = _calls(one.graph.nodes) & _calls(other.graph.nodes)
    names = {name for name, _ in shared} | {RESULT}
    expected, found = _values(one, images, names), _values(other, images, names)
    errors = {name: _error(expected[name], found[name]) for name in names}
    bounds = dict.fromkeys(names, TOLERANCE)
    if errors[RESULT] > TOLERANCE:
        noise = _values(_with_noise(one, precision), images, names)
        bounds = {name: max(TOLERANCE, 100 * _error(expected[name], noise[name])) for name in names}
    if errors[RESULT] <= bounds[RESULT]:
        return None
    wrong = {name for name in names if not errors[name] <= bounds[name]}
    return _first(other, names, wrong, errors, bounds)


def _first(
    module: GraphModule, shared: set[str], wrong: set[str], errors: dict[str, float], bounds: dict[str, float]
) -> Difference:
    """The first of the `wrong` nodes from which only wrong and new ones lead to the result."""
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    output = next(reversed(module.graph.nodes))
    suspects = _reached(output, lambda node: node.name not in shared or node.name in wrong)
    node = next(node for node in order if node in suspects and _name(node) in wrong)
    made = _reached(node, lambda other: other.name not in shared)
    agreeing = {source for part in made for source in part.all_input_nodes if source not in made}
    return Difference(
        _name(node),
        errors[_name(node)],
        bounds[_name(node)],
        _named(sorted(made - {node}, key=order.__getitem__)),
        _named(sorted(agreeing, key=order.__getitem__)),
        _named(node.users),
        errors[RESULT],
    )


def _reached(start: Node, goes_on: Any) -> set[Node]:
    """`start` and all nodes before it, as far as they go on."""
    found, pending = {start}, [start]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found and source.op == "call_function" and goes_on(source):
                found.add(source)
                pending.append(source)
    return found


def _named(nodes: Iterable[Node]) -> tuple[str, ...]:
    """Nodes by name, constants by their paths."""
    return tuple(str(node.target) if node.op == "get_attr" else node.name for node in nodes)


def _name(node: Node) -> str:
    return RESULT if node.op == "output" else node.name


def _calls(nodes: Iterable[Node]) -> set[tuple[str, Any]]:
    return {(node.name, node.target) for node in nodes if node.op == "call_function"}


def _refuse_other_input(before: GraphModule, after: GraphModule) -> None:
    one, other = (getattr(getattr(module, "info", None), "frames", None) for module in (before, after))
    if one != other:
        raise ModelError(
            f"one graph takes {one or 'normalised images'} and the other {other or 'normalised images'}: "
            f"lower both with the same frames"
        )


def _in_double(module: GraphModule) -> GraphModule:
    """A copy that computes in float64, in ATen operators."""
    closed = any(node.op in ("call_module", "call_method") for node in module.graph.nodes)
    copy = deepcopy(module).double().eval()
    if closed and isinstance(copy, TracedModule):
        copy, _ = specialise_to_evaluation(copy)
    name_double_(copy)  # type: ignore[arg-type]
    return copy


def _with_noise(module: GraphModule, precision: float) -> GraphModule:
    """A copy with every weight one unit in the last place of its precision away."""
    noisy = deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*noisy.parameters(), *noisy.buffers()):
        if tensor.is_floating_point():
            signs = 2 * torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) - 1
            tensor.mul_(1 + precision * signs)
    return noisy


def _values(module: GraphModule, images: torch.Tensor, names: set[str]) -> Values:
    """What the nodes of these names hold, and the result."""
    held: Values = {}
    changing = any(writes(node) for node in module.graph.nodes)

    class Keeping(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if _name(n) in names:
                tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
                held[_name(n)] = [tensor.clone() for tensor in tensors] if changing else tensors
            return value

    with evaluating(module):
        Keeping(module).run(images)
    return held


def _error(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    if len(before) != len(after):
        return float("inf")
    return max((relative_error(one, other) for one, other in zip(before, after, strict=True)), default=0.0)
