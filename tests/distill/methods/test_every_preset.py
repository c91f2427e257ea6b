"""What every preset owes: a step that reaches all that learns, teachers left alone, a student that comes
out.
"""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

import vmkd_fx as vx
from tests.checks import assert_is, assert_same_module, fingerprint
from tests.distill.methods.pairs import PAIRS, Pair
from vmkd_fx.distill.methods import PRESETS
from vmkd_fx.distill.task import DistillationTask
from vmkd_fx.graph.replace import replacements
from vmkd_fx.passes.injections import Injected, edits_of, inject

every_preset = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.preset)


def by_preset(*default: str) -> pytest.MarkDecorator:
    """Every preset: those named in each run, the others under the marker `slow`."""
    cases = [
        pytest.param(pair, id=pair.preset, marks=() if pair.preset in default else pytest.mark.slow)
        for pair in PAIRS
    ]
    return pytest.mark.parametrize("pair", cases)


one_of_a_kind = by_preset("std", "vitkd", "riformer", "ccs", "cit", "deit", "kd")


def batch(task: DistillationTask, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = task.trainable_module.info.need_input_size()
    return torch.randn(count, *size, generator=generator), torch.arange(count) % 10


def test_every_preset_has_a_pair() -> None:
    assert {name for pair in PAIRS for name in pair.preset.split("+")} == set(PRESETS)


@every_preset
def test_a_step_reaches_all_that_learns(pair: Pair) -> None:
    task = pair.wrap().train()
    out = task(*batch(task))
    terms = {name: value for name, value in out.items() if "/" in name}
    assert out["loss"].isfinite()
    assert terms or pair.preset == "ccs"
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    out["loss"].backward()
    student = task.trainable_module
    assert [name for name, p in student.named_parameters() if p.grad is None] == []
    assert [name for name, p in task.teachers.named_parameters() if p.grad is not None] == []


@every_preset
def test_three_steps_lower_the_loss(pair: Pair) -> None:
    task = pair.wrap().train()
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=3e-3)
    given, losses = batch(task, 8), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = task(*given)["loss"]
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert sum(losses[-3:]) < sum(losses[:3])


@one_of_a_kind
def test_what_is_given_is_left_alone(pair: Pair) -> None:
    student, teachers = pair.make_student(), pair.make_teachers()
    for teacher in teachers:
        teacher.train()
    before = [fingerprint(model) for model in (student, *teachers)]
    task = pair.wrap(student=student, teachers=teachers).train()
    task(*batch(task))["loss"].backward()
    task.eval()
    for model, was in zip((student, *teachers), before, strict=True):
        assert_same_module(model, was)


@every_preset
def test_the_student_comes_out(pair: Pair) -> None:
    student = pair.make_student()
    task = pair.wrap(student=student)
    stripped = vx.strip(task)
    x, _ = batch(task, 2)
    if replacements(stripped):
        assert not [name for name in stripped.state_dict() if name.startswith("vmkd.")]
        torch.testing.assert_close(stripped.eval()(x), task.get_eval_model().eval()(x), rtol=0, atol=0)
    else:
        assert_is(stripped, student, x)


@one_of_a_kind
def test_the_student_is_built_again_without_its_teachers(pair: Pair) -> None:
    task = pair.wrap()
    edits = json.loads(json.dumps([edit.to_json() for edit in edits_of(task.trainable_module)]))
    built = inject(vx.trace(pair.make_student()), [Injected.from_json(edit) for edit in edits])
    assert built.code == task.trainable_module.code
    built.load_state_dict(task.trainable_module.state_dict(), strict=True)


@by_preset("vitkd")
def test_it_compiles_as_one_graph(pair: Pair) -> None:
    torch._dynamo.reset()
    task = pair.wrap().eval()
    given = batch(task)
    expected = task(*given)["loss"]
    task.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(task(*given)["loss"], expected)
    assert task.train()(*given)["loss"].isfinite()


@one_of_a_kind
def test_it_is_copied_and_pickled(pair: Pair) -> None:
    task = pair.wrap().eval()
    given = batch(task)
    expected = task(*given)["loss"]
    assert torch.equal(copy.deepcopy(task)(*given)["loss"], expected)
    restored = pickle.loads(pickle.dumps(task.trainable_module))
    found, whole = restored(given[0]), task.trainable_module(given[0])
    assert torch.equal(*(out["logits"] if isinstance(out, dict) else out for out in (found, whole)))


@one_of_a_kind
def test_soft_labels_and_half_precision(pair: Pair) -> None:
    task = pair.wrap().train()
    x, target = batch(task)
    soft = torch.nn.functional.one_hot(target, 10).float() * 0.9 + 0.01
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(x, soft)["loss"]
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    loss.backward()
