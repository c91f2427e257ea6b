"""Which files an ONNX graph would have its runtime open: read off the bytes, without the package onnx.

A tensor may say that its data lie in another file, by any path. Runtimes have followed such paths out of the
model's folder, and one of them reads "paths" that are addresses in memory. So a bundle's graph is looked
through before any runtime sees it. The bytes are Protocol Buffers: a message is a row of fields, each a key
(number and kind) and a value; which fields lead to a tensor is the table below.
"""

from __future__ import annotations

from vmkd_fx.errors import BundleError

# Field numbers of onnx.proto by message: where a message stands that can hold a tensor, and which one.
HOLDERS: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
}

_KEY = b"location"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEEPEST = 64


def external_files(graph: bytes) -> tuple[str, ...]:
    """The names of the files that the tensors of an ONNX model lie in, sorted; empty if it is in one piece.

    Raises:
        BundleError: the bytes are no ONNX model.
    """
    if _KEY not in graph:
        return ()
    view, found = memoryview(graph), set()
    waiting = [("ModelProto", 0, len(graph), 0)]
    while waiting:
        message, start, end, depth = waiting.pop()
        if depth > _DEEPEST:
            raise BundleError(f"its graphs stand in one another more than {_DEEPEST} deep")
        if message == "StringStringEntryProto":
            found |= _location(view, start, end)
            continue
        holders = HOLDERS[message]
        for number, kind, left, right in fields(view, start, end):
            if kind == _BYTES and number in holders:
                waiting.append((holders[number], left, right, depth + 1))
    return tuple(sorted(found))


def _location(view: memoryview, start: int, end: int) -> set[str]:
    """The value of an entry of `external_data` whose key is "location", which may stand behind the value."""
    entry = [
        (number, bytes(view[left:right]))
        for number, kind, left, right in fields(view, start, end)
        if kind == _BYTES
    ]
    if (1, _KEY) not in entry:
        return set()
    return {value.decode("utf-8", "backslashreplace") for number, value in entry if number == 2}


def fields(view: memoryview, start: int, end: int) -> list[tuple[int, int, int, int]]:
    """Number, kind, and where the value begins and ends, of each field of the message at start..end.

    Raises:
        BundleError: the bytes are no message.
    """
    found = []
    while start < end:
        key, start = varint(view, start, end)
        number, kind = key >> 3, key & 7
        left = right = start
        if kind == _VARINT:
            _, right = varint(view, start, end)
        elif kind == _FIXED64:
            right = start + 8
        elif kind == _FIXED32:
            right = start + 4
        elif kind == _BYTES:
            length, left = varint(view, start, end)
            right = left + length
        if right > end or right == start or not number:
            raise BundleError("it is no ONNX model: its bytes make no message")
        found.append((number, kind, left, right))
        start = right
    return found


def varint(view: memoryview, start: int, end: int) -> tuple[int, int]:
    """The number at `start`, seven bits a byte, and where it ends.

    Raises:
        BundleError: it does not end before `end`.
    """
    value = 0
    for index in range(start, min(end, start + 10)):
        byte = view[index]
        value |= (byte & 0x7F) << 7 * (index - start)
        if byte < 0x80:
            return value, index + 1
    raise BundleError("it is no ONNX model: its bytes make no message")
