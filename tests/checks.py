"""What every pass owes, in one place."""

from __future__ import annotations

import torch
from torch import nn

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
