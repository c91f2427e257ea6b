"""The choice: sensible by the model, right by measurement, plain data for the ledger."""

from __future__ import annotations

import json
import time

import pytest

from tests.slow import rest_slow
from vmkd_fx.deploy.onnx_operators import translations
from vmkd_fx.errors import BuildError, ModelError, UnknownNameError
from vmkd_fx.passes.mixing.choose import RATES, candidates, choose, factorisations, named, predicted
from vmkd_fx.passes.mixing.measure import interleaved, measure
from vmkd_fx.passes.mixing.problem import Problem

SIZES = {196: 768, 784: 384, 3136: 192, 12544: 96}


def test_factorisations() -> None:
    assert list(factorisations(1, 4)) == [(1,)]
    assert list(factorisations(7, 4)) == [(7,)]
    assert set(factorisations(12, 2)) == {(12,), (2, 6), (3, 4), (4, 3), (6, 2)}
    assert (2, 2, 3) in set(factorisations(12, 3))


@pytest.mark.parametrize("kind", RATES)
def test_more_work_never_costs_less(kind: str) -> None:
    """Twice the batch and twice the channels cost each realisation more."""
    for name in ("dense", "convolution", "real-split 1", "matrix-fft 14.14", "partial-fft 14.14", "onnx-dft"):
        small, batch, wide = (Problem((196,), c, 8, b) for c, b in ((384, 1), (384, 2), (768, 1)))
        one, two, three = (predicted(named(problem, name), kind) for problem in (small, batch, wide))
        assert one < two and one < three


@pytest.mark.parametrize("kind", RATES)
def test_dense_loses_its_lead_once_as_tokens_grow(kind: str) -> None:
    ratios = []
    for tokens in (4, 16, 64, 256, 1024):
        problem = Problem((tokens,), 64, 8)
        best = predicted(choose(problem, kind)[0], kind)
        ratios.append(predicted(named(problem, "dense"), kind) / best)
    assert ratios[0] == pytest.approx(1) and ratios == sorted(ratios)


@pytest.mark.parametrize(("tokens", "channels"), SIZES.items())
def test_large_grids_are_not_multiplied_densely(tokens: int, channels: int) -> None:
    for kind in ("torch", "onnxruntime"):
        _, choice = choose(Problem((tokens,), channels, 8), kind)
        assert tokens < 784 or not choice.name.startswith(("dense", "real-split"))
        assert choice.name not in ("onnx-dft", "convolution")


def test_only_what_fits_is_a_candidate_and_the_rest_has_a_reason() -> None:
    for kind in RATES:
        problem = Problem((12544,), 96, 8)
        assert all(one.fits(kind) is None for one in candidates(problem, kind, each=0))
        _, choice = choose(problem, kind)
        assert "GiB" in choice.refused["dense"]
    assert "real-fft" in choose(Problem((12,), 6, 2), "tensorrt-rtx")[1].refused
    assert "real-fft" not in choose(Problem((12,), 6, 2), "torch")[1].refused


def test_measurements_decide_over_the_model_and_are_plain_data() -> None:
    problem = Problem((12,), 6, 2)
    _, by_model = choose(problem, "torch")
    times = {"convolution": 1e-6, "dense": 2e-6}
    realisation, choice = choose(problem, "torch", measured=times)
    assert by_model.by == "model" and by_model.name != "convolution"
    assert realisation.name == choice.name == "convolution" and choice.by == "measured"
    assert json.loads(json.dumps(choice.as_data()))["seconds"] == times
    assert named(problem, choice.name) == realisation
    with pytest.raises(ModelError, match="none of the measured onnx-dft fits"):
        choose(problem, "torch", measured={"onnx-dft": 1e-6})


@pytest.mark.parametrize("kind", rest_slow(["torch", "onnxruntime"]))
def test_measured_on_this_machine(kind: str) -> None:
    problem = Problem((49,), 8, 2)
    known = candidates(problem, kind, each=1)
    times = measure(problem, kind, known, translations(), seconds=0.1)
    assert set(times) == {one.name for one in known}
    assert list(times.values()) == sorted(times.values()) and min(times.values()) > 0
    assert choose(problem, kind, measured=times)[1].name == next(iter(times))
    without = measure(problem, kind, known, seconds=0.1)
    assert set(times) - set(without) == ({"onnx-dft"} if kind == "onnxruntime" else set())


def test_the_slower_call_takes_longer() -> None:
    times = interleaved({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, 0.1)
    assert times["slow"] >= 0.02 > times["fast"]


def test_what_cannot_be_measured_or_named_is_refused() -> None:
    problem = Problem((12,), 6, 2)
    with pytest.raises(BuildError, match="chosen by the cost model"):
        measure(problem, "tensorrt-rtx", candidates(problem, "tensorrt-rtx"))
    with pytest.raises(UnknownNameError, match=r"realisation 'matrix-fft 5\.2'"):
        named(problem, "matrix-fft 5.2")
    with pytest.raises(UnknownNameError, match="target 'tensorflow'"):
        choose(problem, "tensorflow")
