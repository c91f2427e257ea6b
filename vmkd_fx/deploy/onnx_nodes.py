"""The nodes of an ONNX file, read off its bytes: who builds engines need not have the package onnx.

Weights are skipped, not read. The file may come from anywhere: lengths are checked, nothing is followed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vmkd_fx.deploy.onnx_wire import fields, varint
from vmkd_fx.errors import BuildError, BundleError

# Data types of onnx.proto by number, as TensorRT spells them.
TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16"}
STANDARD = ("", "ai.onnx")

_COMPUTED = "constants"  # where lowering puts what it computed once, which is no module
_VARINT, _BYTES = 0, 2


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        name: may be empty.
        operator: as in "LayerNormalization".
        inputs, outputs: names of values; an optional input that is left out is "".
        domain: of the operator, "" for the standard's.
        numbers: its integer attributes.
        namespace: the modules around it as the exporter wrote them, or "".
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str = ""
    numbers: dict[str, int] = field(default_factory=dict)
    namespace: str = ""


@dataclass(frozen=True)
class Graph:
    """An ONNX graph without its weights.

    Attributes:
        opset: the version of the standard's operators.
        nodes: in their order.
        types: of values and weights by name, as in "HALF"; what the file does not say is missing.
        weights: the names of the initializers.
    """

    opset: int
    nodes: tuple[Node, ...]
    types: dict[str, str]
    weights: frozenset[str]

    def where(self, node: Node) -> str:
        """The module that `node` came from, as in "blocks.3.mlp.fc1"; or what it stands between; or "".

        A lowered graph has no modules left. There the weights that one node alone reads keep their path.
        """
        own = _module_of(node.namespace) or self._own_path(node)
        if own:
            return own
        before, after = self._nearest(node, self._readers), self._nearest(node, self._makers)
        sides = [f"after {after}"] * bool(after) + [f"before {before}"] * bool(before)
        return ", ".join(sides)

    def find(self, name: str) -> Node | None:
        """The node of that name."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes if node.name}

    @cached_property
    def _makers(self) -> dict[str, list[Node]]:
        """By node, as its first output, the nodes that make what it reads."""
        made = {value: node for node in self.nodes for value in node.outputs}
        return {n.outputs[0]: [made[v] for v in n.inputs if v in made] for n in self.nodes if n.outputs}

    @cached_property
    def _readers(self) -> dict[str, list[Node]]:
        """By node, as its first output, the nodes that read what it makes."""
        reading: dict[str, list[Node]] = {}
        for node in self.nodes:
            for maker in self._makers.get(node.outputs[0], ()) if node.outputs else ():
                reading.setdefault(maker.outputs[0], []).append(node)
        return reading

    @cached_property
    def _reads(self) -> dict[str, int]:
        """How many nodes read each weight: equal ones are stored once, and then name one module of many."""
        counts: dict[str, int] = {}
        for node in self.nodes:
            for value in set(node.inputs) & self.weights:
                counts[value] = counts.get(value, 0) + 1
        return counts

    def _own_path(self, node: Node) -> str:
        owned = (v.rpartition(".")[0] for v in node.inputs if self._reads.get(v) == 1)
        return next((path for path in owned if path not in ("", _COMPUTED)), "")

    def _nearest(self, node: Node, neighbours: dict[str, list[Node]]) -> str:
        """The path of the nearest node on one side that has one."""
        seen, row = {id(node)}, [node]
        while row:
            row = [n for item in row for n in neighbours.get(item.outputs[0] if item.outputs else "", ())]
            row = [n for n in {id(n): n for n in row}.values() if id(n) not in seen]
            seen |= {id(n) for n in row}
            for found in row:
                path = _module_of(found.namespace) or self._own_path(found)
                if path:
                    return path
        return ""


def read_graph(path: Path) -> Graph:
    """The graph in the ONNX file `path`.

    Raises:
        BuildError: the file is no ONNX model.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise BuildError(f"{path} is no ONNX model: it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
                return _graph(view)
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror or error}") from error
    except (BundleError, UnicodeDecodeError) as error:
        raise BuildError(f"{path} is no ONNX model: its bytes make none") from error


Span = tuple[int, int]


def _graph(view: memoryview) -> Graph:
    opset, graph = 0, None
    for number, _, left, right in fields(view, 0, len(view)):
        if number == 7:
            graph = (left, right)
        elif number == 8:
            domain, version = _opset(view, (left, right))
            opset = version if domain in STANDARD else opset
    if graph is None or not opset:
        raise BundleError("it is no ONNX model: it has no graph or no operator set")
    nodes, types, weights = [], {}, set()
    for number, _, left, right in fields(view, *graph):
        span = (left, right)
        if number == 1:
            nodes.append(_node(view, span))
        elif number == 5:
            name, kind = _named(view, span, name=8, number=2)
            weights.add(name)
            types[name] = TYPES.get(kind, str(kind))
        elif number in (11, 12, 13):
            name, kind = _value(view, span)
            types[name] = TYPES.get(kind, str(kind))
    return Graph(opset, tuple(nodes), types, frozenset(weights))


def _node(view: memoryview, span: Span) -> Node:
    texts: dict[int, list[str]] = {}
    numbers: dict[str, int] = {}
    namespace = ""
    for number, _, left, right in fields(view, *span):
        if number in (1, 2, 3, 4, 7):
            texts.setdefault(number, []).append(_text(view, left, right))
        elif number == 5:
            name, value = _named(view, (left, right), name=1, number=3)
            numbers[name] = value - 2**64 if value >= 2**63 else value
        elif number == 9:
            key, value_text = _pair(view, (left, right))
            namespace = value_text if key == "namespace" else namespace
    first = {number: found[-1] for number, found in texts.items()}
    return Node(
        name=first.get(3, ""),
        operator=first.get(4, ""),
        inputs=tuple(texts.get(1, ())),
        outputs=tuple(texts.get(2, ())),
        domain=first.get(7, ""),
        numbers=numbers,
        namespace=namespace,
    )


def _opset(view: memoryview, span: Span) -> tuple[str, int]:
    return _named(view, span, name=1, number=2)


def _named(view: memoryview, span: Span, *, name: int, number: int) -> tuple[str, int]:
    """A text and a number of a message, by their field numbers; "" and 0 where they are missing."""
    text, value = "", 0
    for found, kind, left, right in fields(view, *span):
        if found == name and kind == _BYTES:
            text = _text(view, left, right)
        elif found == number and kind == _VARINT:
            value, _ = varint(view, left, right)
    return text, value


def _pair(view: memoryview, span: Span) -> tuple[str, str]:
    found = {
        number: _text(view, left, right)
        for number, kind, left, right in fields(view, *span)
        if kind == _BYTES
    }
    return found.get(1, ""), found.get(2, "")


def _value(view: memoryview, span: Span) -> tuple[str, int]:
    """The name and the data type of a ValueInfoProto: type 2, in it tensor_type 1, in it elem_type 1."""
    name, _ = _named(view, span, name=1, number=0)
    for left, right in _inside(view, span, 2):
        for tensor in _inside(view, (left, right), 1):
            return name, _named(view, tensor, name=0, number=1)[1]
    return name, 0


def _inside(view: memoryview, span: Span, wanted: int) -> Iterator[Span]:
    for number, kind, left, right in fields(view, *span):
        if number == wanted and kind == _BYTES:
            yield left, right


def _text(view: memoryview, left: int, right: int) -> str:
    return bytes(view[left:right]).decode()


def _module_of(namespace: str) -> str:
    """The innermost module of a namespace ": class/blocks: class/blocks.0: class/add: operator"."""
    places = [part.partition(": ") for part in namespace.split("/")]
    return next((path for path, _, _ in reversed(places[:-1]) if path), "")
