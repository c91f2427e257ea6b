"""One spelling for every operation: a traced model as a functional graph of ATen operators.

torch.export writes each model in the same small vocabulary, whatever its author called: no modules, no
methods, nothing in place, sizes of the images as numbers and the batch as the one symbol. A pass that reads
this form reads all models. It holds for eval mode and for one size of images; parameters keep their paths.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from vmkd_fx.errors import TraceError
from vmkd_fx.graph.functional import write_nothing, writes
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import evaluating, image_form, reference_tensor


def normal_form(module: TracedModule) -> TracedModule:
    """The same function over the same parameters, in ATen operators.

    Raises:
        TraceError: torch.export cannot follow the model, or it holds for one batch size alone.
    """
    shape, dtype = image_form(module, module.info.need_input_size())
    images = torch.zeros(2, *shape, dtype=dtype, device=reference_tensor(module).device)
    read = _of_what_is_read(module)
    with _quiet(), evaluating(module), torch.no_grad():
        try:
            program = torch.export.export(
                read, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
            )
            if not write_nothing(program.graph):
                _refuse_two_paths(program, read)
                program = program.run_decompositions({})  # an empty table: functional, and nothing else
                _name_batch_norms(program.graph)
        except Exception as error:
            raise TraceError(f"{module.info.name} has no graph of ATen operators: {error}") from error
        exported = program.module(check_guards=False)
    return _over_the_same_parameters(module, exported)


def _of_what_is_read(module: TracedModule) -> GraphModule:
    """The same graph over those modules and tensors alone that it names.

    A module that is called at two places of the tree has two paths there and one in the graph, and
    torch.export refuses to make a write functional that reaches a tensor under two paths.
    """
    graph = Graph(tracer_cls=module.graph._tracer_cls)
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph)


def _refuse_two_paths(program: ExportedProgram, module: GraphModule) -> None:
    """A closed module may still hold what it writes to under two paths."""
    buffers, tensors = program.graph_signature.inputs_to_buffers, dict(_tensors(module))
    operands = [node.args[0] for node in program.graph.nodes if writes(node)]
    for path in (buffers[node.name] for node in operands if isinstance(node, Node) and node.name in buffers):
        others = [other for other, tensor in tensors.items() if tensor is tensors[path] and other != path]
        if others:
            raise TraceError(
                f"its forward writes to {path}, which is {others[0]} as well, and torch.export follows what "
                "is written to under one path alone: let one attribute hold the module, and call it twice"
            )


def _over_the_same_parameters(module: TracedModule, exported: nn.Module) -> TracedModule:
    assert isinstance(exported, GraphModule)
    _drop_checks(exported)
    root = GraphModule(exported, _plain(exported.graph))
    _open_plain_blocks(root)
    held = dict(_tensors(module))
    for path, tensor in _tensors(root):
        if path in held and held[path] is not tensor and held[path].shape == tensor.shape:
            holder, _, name = path.rpartition(".")
            setattr(root.get_submodule(holder), name, held[path])
    root.meta = dict(module.meta)
    return TracedModule(root, root.graph)


def _drop_checks(exported: GraphModule) -> None:
    """Blocks under autocast are graphs of their own, which check the dtypes that they were exported with."""
    for block in exported.modules():
        if block is not exported and isinstance(block, GraphModule):
            for node in block.graph.find_nodes(
                op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
            ):
                block.graph.erase_node(node)
            block.recompile()


def _open_plain_blocks(root: GraphModule) -> None:
    """Blocks without autocast become part of the graph around them, where passes reach them."""
    while blocks := [node for node in root.graph.nodes if _plain_block(root, node) is not None]:
        for node in blocks:
            block = _plain_block(root, node)
            assert block is not None
            inputs = dict(zip(block.graph.find_nodes(op="placeholder"), node.args[5:], strict=True))
            for step in block.graph.nodes:
                step.meta.clear()
            with root.graph.inserting_before(node):
                result = root.graph.graph_copy(block.graph, inputs)
            for item in list(node.users):
                if isinstance(result, (tuple, list)):
                    item.replace_all_uses_with(result[item.args[1]])
                    root.graph.erase_node(item)
            if isinstance(result, Node):
                node.replace_all_uses_with(result)
            root.graph.erase_node(node)
    root.graph.eliminate_dead_code()


def _plain_block(root: GraphModule, node: Node) -> GraphModule | None:
    """The graph that `node` runs with autocast switched off; None for anything else."""
    if node.target is not torch.ops.higher_order.wrap_with_autocast or node.args[2] is not False:
        return None
    held: Any = node.args[4]
    block = root.get_submodule(held.target)
    assert isinstance(block, GraphModule)
    return None if block.graph.find_nodes(op="get_attr") else block


def _plain(exported: Graph) -> Graph:
    """The graph without the exporter's way of passing arguments, its checks and its notes."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in exported.nodes:
        if node.op == "call_module" or (node.op == "call_function" and not node.users and not writes(node)):
            continue  # guards and assertions, which the fixed size has answered
        if node.op == "output":
            (value,) = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            graph.output(copies[value])
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta.clear()
    return graph


def _name_batch_norms(graph: Graph) -> None:
    """Making a graph functional takes every BatchNorm apart; in evaluation it is one operator again."""
    apart = torch.ops.aten._native_batch_norm_legit_no_training.default
    for node in [node for node in graph.nodes if node.target is apart]:
        source, weight, bias, mean, variance, momentum, eps = node.args
        with graph.inserting_before(node):
            args = (source, weight, bias, mean, variance, False, momentum, eps, False)
            whole = graph.call_function(torch.ops.aten.batch_norm.default, args)
        for item in list(node.users):
            if item.args[1] == 0:
                item.replace_all_uses_with(whole)
    graph.eliminate_dead_code()


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
