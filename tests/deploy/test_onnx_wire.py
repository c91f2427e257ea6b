from __future__ import annotations

import onnx
import pytest
from google.protobuf.descriptor import Descriptor

from tests.deploy.tiny import tiny_graph
from vmkd_fx.deploy.onnx_wire import HOLDERS, external_files
from vmkd_fx.errors import BundleError


def leads_to_a_tensor(message: Descriptor, seen: frozenset[str] = frozenset()) -> bool:
    if message.name == "TensorProto":
        return True
    parts = (f.message_type for f in message.fields if f.message_type and f.message_type.name not in seen)
    return any(leads_to_a_tensor(part, seen | {message.name}) for part in parts)


def test_the_table_is_all_of_onnx_that_leads_to_a_tensor() -> None:
    """Read from the schema of the package onnx, which the runtime does without."""
    found: dict[str, dict[int, str]] = {}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        if message.name in found:
            continue
        parts = [field for field in message.fields if field.message_type]
        parts = [field for field in parts if leads_to_a_tensor(field.message_type)]
        found[message.name] = {field.number: field.message_type.name for field in parts}
        waiting += [field.message_type for field in parts]
    found["TensorProto"] = {
        onnx.TensorProto.DESCRIPTOR.fields_by_name["external_data"].number: "StringStringEntryProto"
    }
    assert found == HOLDERS


def elsewhere(tensor: onnx.TensorProto, location: str) -> onnx.TensorProto:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_tensors_wherever_they_stand() -> None:
    model = tiny_graph()
    graph, tensor = model.graph, onnx.TensorProto()
    tensor.CopyFrom(graph.initializer[0])
    elsewhere(graph.initializer[0], "a")
    graph.sparse_initializer.add().values.CopyFrom(elsewhere(tensor, "b"))
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "g", [], [])
    inner.node[0].attribute[0].t.external_data[1].value = "c/../d"
    graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))
    model.functions.add().node.append(onnx.helper.make_node("F", [], [], many=[tensor, tensor]))
    model.functions[0].node[0].attribute[0].tensors[1].external_data[1].value = "é"
    assert external_files(model.SerializeToString()) == ("a", "b", "c/../d", "é")


def test_the_word_alone_is_no_location() -> None:
    model = tiny_graph()
    assert external_files(model.SerializeToString()) == ()
    model.graph.node[0].name = model.doc_string = "location"
    model.metadata_props.add(key="location", value="here")
    assert external_files(model.SerializeToString()) == ()


def test_an_entry_that_says_it_twice_or_the_wrong_way_round() -> None:
    tensor = onnx.TensorProto(name="t", data_location=onnx.TensorProto.EXTERNAL)
    entry = b"\x12\x04last" + b"\x0a\x08location" + b"\x12\x05other"
    raw = b"".join((tensor.SerializeToString(), b"\x6a", bytes([len(entry)]), entry))
    graph = b"\x2a" + bytes([len(raw)]) + raw
    assert external_files(b"\x3a" + bytes([len(graph)]) + graph) == ("last", "other")


def test_what_is_no_message_is_refused() -> None:
    whole = tiny_graph()
    elsewhere(whole.graph.initializer[0], "a")
    raw = whole.SerializeToString()
    for spoiled in (
        raw[:-1],
        b"\xff" * 20 + raw,
        raw + b"\x0b",
        b"\x00\x00" + raw,
        raw + b"\x3a\xff\xff\xff\xff\x0f",
    ):
        with pytest.raises(BundleError, match="no ONNX model"):
            external_files(spoiled)


def test_a_graph_in_a_graph_in_a_graph() -> None:
    raw = b"location"
    for number in (6, 5, 1) * 40:  # attribute.g, node.attribute, graph.node
        length = len(raw).to_bytes(2, "little")
        size = bytes([len(raw)]) if len(raw) < 128 else bytes([length[0] & 127 | 128, (len(raw) >> 7)])
        raw = bytes([number << 3 | 2]) + size + raw
    graph = b"\x3a" + bytes([len(raw) & 127 | 128, len(raw) >> 7]) + raw
    with pytest.raises(BundleError, match="more than 64 deep"):
        external_files(graph)
