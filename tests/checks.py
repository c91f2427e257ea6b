"""What every pass owes, in one place."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import vmkd_fx as vx
from vmkd_fx.graph.traced import TracedModule


def assert_same_module(given: nn.Module, before: dict[str, object]) -> None:
    """The user's model is as it was: class, forward, modes, hooks, flags, keys, children."""
    assert fingerprint(given) == before


def fingerprint(module: nn.Module) -> dict[str, object]:
    return {
        "class": type(module),
        "forward": module.forward.__func__,
        "modes": {name: part.training for name, part in module.named_modules()},
        "hooks": {
            name: (len(part._forward_hooks), len(part._forward_pre_hooks))
            for name, part in module.named_modules()
        },
        "flags": {name: p.requires_grad for name, p in module.named_parameters()},
        "identity": {name: id(p) for name, p in [*module.named_parameters(), *module.named_buffers()]},
        "children": [(name, type(part)) for name, part in module.named_modules()],
        "attributes": {name: sorted(vars(part)) for name, part in module.named_modules()},
    }


def assert_is(stripped: TracedModule, student: nn.Module, images: torch.Tensor) -> None:
    """A stripped graph is the student: code, keys, parameter identity and bitwise output."""
    assert stripped.code == vx.trace(student).code
    assert list(stripped.state_dict()) == list(student.state_dict())
    assert [id(p) for p in stripped.parameters()] == [id(p) for p in student.parameters()]
    modes = {part: part.training for part in student.modules()}
    student.eval()
    stripped.eval()
    with torch.no_grad():
        assert torch.equal(stripped(images), student(images))
    for part, mode in modes.items():
        part.training = mode


def assert_computes_the_same(graph: nn.Module, model: nn.Module, *inputs: torch.Tensor) -> None:
    """Both modules, over tensors of their own, agree bit for bit: outputs in eval(), then in train() under
    the same random state, the gradients and running statistics of that step, then outputs in eval() again.

    Outputs may be tensors or nested lists and dicts of them.
    """
    for mode in (False, True, False):
        graph.train(mode)
        model.train(mode)
        found, expected = (_outputs(module, inputs, mode) for module in (graph, model))
        assert len(found) == len(expected)
        assert all(map(identical, found, expected)), f"another output in {'train' if mode else 'eval'}()"
        if mode:
            for (name, one), other in zip(model.named_parameters(), graph.parameters(), strict=True):
                assert (one.grad is None) == (other.grad is None), f"{name}: only one has a gradient"
                assert one.grad is None or identical(one.grad, other.grad), f"another gradient of {name}"
    ours, theirs = graph.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    unlike = [name for name, value in theirs.items() if not identical(ours[name], value)]
    assert not unlike, f"another state after the step: {unlike}"


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same dtype, shape and values; a NaN equals a NaN."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _outputs(module: nn.Module, inputs: tuple[torch.Tensor, ...], training: bool) -> list[torch.Tensor]:
    torch.manual_seed(3)
    module.zero_grad()
    with torch.set_grad_enabled(training):
        tensors = [leaf for leaf in tree_leaves(module(*inputs)) if isinstance(leaf, torch.Tensor)]
    if training:
        torch.stack([tensor.square().mean() for tensor in tensors]).sum().backward()
    return [tensor.detach() for tensor in tensors]
