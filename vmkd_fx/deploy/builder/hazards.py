"""Which known defects of a builder a graph would meet: the detectors that the hazard table names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vmkd_fx.deploy.builder.hazard_table import HAZARDS, REFUSED, Hazard
from vmkd_fx.deploy.builder.names import Version
from vmkd_fx.deploy.onnx_nodes import STANDARD, TYPES, Graph, Node
from vmkd_fx.errors import BuildError
from vmkd_fx.steps import Refusal

_HALVES = ("HALF", "BF16")
_ACTIVATIONS = ("Relu", "LeakyRelu", "Clip", "Gelu", "Mul", "HardSwish", "Elu", "Sigmoid", "Tanh")
_SHOWN = 3


@dataclass(frozen=True)
class Met:
    """A hazard and the nodes of the graph that meet it, as they are named or numbered."""

    hazard: Hazard
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.nodes[:_SHOWN])
        more = f" and {len(self.nodes) - _SHOWN} more" if len(self.nodes) > _SHOWN else ""
        return f"at {shown}{more}: {self.hazard}"


def met(graph: Graph, kind: str, version: Version, sms: Iterable[int] = ()) -> tuple[Met, ...]:
    """The hazards of the package `kind` in `version` that `graph` meets.

    Args:
        sms: the compute capabilities that the engine is for.
    """
    chosen = [h for h in HAZARDS if h.kind == kind and h.since <= version and not _past(h, version)]
    wanted = set(sms)
    return _met(graph, [h for h in chosen if not h.sms or wanted & set(h.sms)])


def could_meet(graph: Graph) -> tuple[Met, ...]:
    """The hazards that `graph` would meet with any version of either package.

    Not among them is what a target alone decides, and what its build refuses.
    """
    return _met(graph, [h for h in HAZARDS if not h.sms or h.answer != REFUSED])


def refusals(found: Iterable[Met]) -> tuple[Refusal, ...]:
    """The hazards as the ledger holds them: the nodes that were left as they are, and what may go wrong."""
    return tuple(Refusal(node, str(item.hazard)) for item in found for node in item.nodes)


def refuse(found: Iterable[Met], package: str) -> None:
    """Raise a BuildError for the hazards that are refused."""
    refused = [str(item) for item in found if item.hazard.answer == REFUSED]
    if refused:
        raise BuildError(f"{package} would fail on this graph, or build it wrong: " + "; and ".join(refused))


def _past(hazard: Hazard, version: Version) -> bool:
    return hazard.before is not None and version >= hazard.before


def _met(graph: Graph, hazards: Iterable[Hazard]) -> tuple[Met, ...]:
    found = ((hazard, PATTERNS[hazard.pattern](graph)) for hazard in hazards)
    return tuple(
        Met(hazard, tuple(_called(graph, node) for node in nodes)) for hazard, nodes in found if nodes
    )


def _called(graph: Graph, node: Node) -> str:
    """The node's name, its operator and the module that it came from."""
    where = graph.where(node)
    name = node.name or (node.outputs[0] if node.outputs else "")
    return f"{name} ({node.operator}{f', {where}' if where else ''})"


def _operators(graph: Graph, *names: str) -> list[Node]:
    return [node for node in graph.nodes if node.operator in names and node.domain in STANDARD]


def _in(graph: Graph, node: Node, types: tuple[str, ...]) -> bool:
    """Whether the first input, or what is made of it, has one of the data types."""
    values = (*node.inputs[:1], *node.outputs[:1])
    return any(graph.types.get(value) in types for value in values)


def _all_above(opset: int) -> Callable[[Graph], list[Node]]:
    return lambda graph: list(graph.nodes[:1]) if graph.opset > opset else []


def _group_norm_of_one_group(graph: Graph) -> list[Node]:
    return [node for node in _operators(graph, "GroupNormalization") if node.numbers.get("num_groups") == 1]


def _group_norm_of_opset_21(graph: Graph) -> list[Node]:
    return _operators(graph, "GroupNormalization") if graph.opset >= 21 else []


def _attention_in_float(graph: Graph) -> list[Node]:
    return [node for node in _operators(graph, "Attention") if not _in(graph, node, _HALVES)]


def _attention_of_one_tensor(graph: Graph) -> list[Node]:
    return [
        node for node in _operators(graph, "Attention") if len(set(node.inputs[:3])) < len(node.inputs[:3])
    ]


def _layer_norm_in_half(graph: Graph) -> list[Node]:
    return [node for node in _operators(graph, "LayerNormalization") if _in(graph, node, ("HALF",))]


def _softmax_in_half(graph: Graph) -> list[Node]:
    return [node for node in _operators(graph, "Softmax") if _in(graph, node, _HALVES)]


def _products_not_in_half(graph: Graph) -> list[Node]:
    return [node for node in _operators(graph, "MatMul", "Gemm") if not _in(graph, node, ("HALF", "INT8"))]


def _quantisation_to_uint8(graph: Graph) -> list[Node]:
    """Also where nothing is said: without a zero point and a type, the standard means uint8."""
    found = []
    for node in _operators(graph, "QuantizeLinear"):
        zero = node.inputs[2] if len(node.inputs) > 2 else ""
        kind = graph.types.get(zero) if zero else TYPES.get(node.numbers.get("output_dtype", 0), "UINT8")
        if kind == "UINT8":
            found.append(node)
    return found


def _residual_of_concatenated(graph: Graph) -> list[Node]:
    """Sums in half of an activated convolution and a value that a concatenation reads too."""
    concatenated = {value for node in _operators(graph, "Concat") for value in node.inputs}
    makers = {value: node for node in graph.nodes for value in node.outputs}
    found = []
    for node in _operators(graph, "Add"):
        if not _in(graph, node, _HALVES) or len(node.inputs) != 2:
            continue
        for operand, other in (node.inputs, node.inputs[::-1]):
            maker = makers.get(other)
            if operand in concatenated and maker is not None and _activates_convolution(maker, makers):
                found.append(node)
                break
    return found


def _activates_convolution(node: Node, makers: dict[str, Node]) -> bool:
    before = [makers[value] for value in node.inputs if value in makers]
    return node.operator in _ACTIVATIONS and any(item.operator == "Conv" for item in before)


PATTERNS: dict[str, Callable[[Graph], list[Node]]] = {
    "quantisation_to_uint8": _quantisation_to_uint8,
    "attention": lambda graph: _operators(graph, "Attention"),
    "attention_in_float": _attention_in_float,
    "attention_of_one_tensor": _attention_of_one_tensor,
    "col2im": lambda graph: _operators(graph, "Col2Im"),
    "dft": lambda graph: _operators(graph, "DFT"),
    "group_norm_of_one_group": _group_norm_of_one_group,
    "group_norm_of_opset_21": _group_norm_of_opset_21,
    "layer_norm_in_half": _layer_norm_in_half,
    "opset_above_20": _all_above(20),
    "opset_above_24": _all_above(24),
    "products_not_in_half": _products_not_in_half,
    "residual_of_concatenated": _residual_of_concatenated,
    "rms_normalization": lambda graph: _operators(graph, "RMSNormalization"),
    "softmax_in_half": _softmax_in_half,
}
