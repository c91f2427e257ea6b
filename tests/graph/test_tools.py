"""The graph goes through what others do to modules: compile, export, channels_last, other dtypes, files."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import vmkd_fx as vx
from tests.checks import identical
from tests.models import images
from tests.zoo import DIVERSE, Member, build, by_family
from vmkd_fx.graph.traced import TracedModule


def _without_rates(member: Member) -> tuple[nn.Module, TracedModule]:
    """In training, two programs that draw in another order cannot agree; all rates are zero here."""
    model = build(member)
    for part in model.modules():
        for name in ("drop_prob", "p"):
            if isinstance(getattr(part, name, None), float) and "rop" in type(part).__name__:
                setattr(part, name, 0.0)
        for name in ("drop_rate", "attn_drop_rate", "attn_dropout_p"):
            if hasattr(part, name):
                setattr(part, name, 0.0)
    return model, vx.trace(copy.deepcopy(model), input_size=(3, member.size, member.size))


def _close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("member", by_family(("resnet",)))
def test_compiled_as_one_graph_in_both_modes(member: Member) -> None:
    torch._dynamo.reset()
    model, graph = _without_rates(member)
    x = images(size=member.size)
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(
        allow_rnn=True
    ):  # Sequencer's LSTMs; torch calls their support experimental
        for mode in (False, True, False):
            model.train(mode)
            graph.train(mode)
            _close(compiled(x), model(x))


@pytest.mark.parametrize("member", by_family(("resnet", "mambaout")))
def test_exported_once_a_mode(member: Member) -> None:
    x = images(size=member.size)
    for mode in (False, True):
        model, graph = _without_rates(member)
        model.train(mode)
        program = torch.export.export(graph.train(mode), (x,))
        _close(program.module()(x), model(x))


@pytest.mark.parametrize("member", by_family(DIVERSE))
def test_channels_last(member: Member) -> None:
    """As the model does there: in another memory layout its own convolutions round otherwise."""
    model = build(member).eval()
    graph = vx.trace(copy.deepcopy(model), input_size=(3, member.size, member.size)).eval()
    x = images(size=member.size).to(memory_format=torch.channels_last)
    ours, theirs = (module.to(memory_format=torch.channels_last) for module in (graph, model))
    with torch.no_grad():
        assert identical(ours(x), theirs(x))


@pytest.mark.parametrize("member", by_family(DIVERSE))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(member: Member, dtype: torch.dtype) -> None:
    model = build(member).eval()
    graph = vx.trace(copy.deepcopy(model), input_size=(3, member.size, member.size)).eval().to(dtype)
    model.to(dtype)
    x = images(size=member.size, dtype=dtype)
    with torch.no_grad():
        try:
            expected = model(x)
        except RuntimeError as error:  # the model itself does not run in this dtype
            with pytest.raises(RuntimeError) as ours:
                graph(x)
            assert str(error).splitlines()[0] in str(ours.value)
            return
        assert identical(graph(x), expected)


@pytest.mark.parametrize("member", by_family(DIVERSE))
def test_saved_and_loaded(member: Member) -> None:
    graph = vx.trace(build(member), input_size=(3, member.size, member.size)).eval()
    file = io.BytesIO()
    torch.save(graph.state_dict(), file)
    file.seek(0)
    other = build(member)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = images(size=member.size)
    with torch.no_grad():
        assert identical(other.eval()(x), graph(x))
        whole = pickle.loads(pickle.dumps(copy.deepcopy(graph)))
        assert identical(whole(x), graph(x))
        assert whole.code == graph.code
