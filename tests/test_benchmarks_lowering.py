"""`benchmarks/lowering.py` and its kin as `make bench-lower` runs them, on a model of a few blocks."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import timm
from onnx import ModelProto, TensorProto, helper, numpy_helper

from vmkd_fx.errors import UnknownNameError
from vmkd_fx.models import register

ROOT = Path(__file__).resolve().parents[1]
PAGE = "before\n<!-- lowering: begin -->\nold\n<!-- lowering: end -->\nafter\n"
MODEL = "test_resnet"
QUICK = ("--runs", "3", "--seconds", "0", "--skip-engine")

pytest.importorskip("onnxslim", reason="the extra `bench` is not installed")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python puts a script's own folder first in the search path."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def load(name: str) -> ModuleType:
    return import_module(name)


def graph_of(*nodes: onnx.NodeProto, **constants: np.ndarray) -> ModelProto:
    """A graph from "x" (B, 4, 6) to "y"."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("B", 4, 6))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


IMAGE = 4 * 6 * 4
"""Bytes of "x" for one image."""


@pytest.mark.parametrize(
    ("node", "constants", "moved"),
    [
        (("Add", ["x", "bias"]), {"bias": np.ones(6, np.float32)}, 2 * IMAGE + 24),
        (("Mul", ["x", "x"]), {}, 2 * IMAGE),
        (("Softmax", ["x"]), {}, 2 * IMAGE),
        (("MatMul", ["x", "w"]), {"w": np.ones((6, 6), np.float32)}, 0),
        (("Reshape", ["x", "shape"]), {"shape": np.array([-1, 24])}, 0),
        (("Gather", ["x", "index"]), {"index": np.array(1)}, 2 * IMAGE // 6 + 8),
        (("Cast", ["x"]), {}, IMAGE + IMAGE // 2),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bytes_follow_the_rule(
    node: tuple[str, list[str]], constants: dict[str, np.ndarray], moved: int
) -> None:
    attributes = {"Gather": {"axis": 2}, "Cast": {"to": TensorProto.FLOAT16}}.get(node[0], {})
    model = graph_of(helper.make_node(*node, ["y"], **attributes), **constants)
    if node[0] == "Cast":
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    assert load("lowering_counts").bytes_moved(model) == moved


def test_a_product_with_what_is_fused_into_it_moves_nothing(tmp_path: Path) -> None:
    counts = load("lowering_counts")
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axis"], ["image"]),
        helper.make_node("Conv", ["image", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Sigmoid", ["r"], ["y"]),
    ]
    weight = np.ones((3, 1, 1, 1), np.float32)
    onnx.save(graph_of(*nodes, axis=np.array([1]), w=weight), tmp_path / "m.onnx")
    found = counts.optimised(tmp_path / "m.onnx", tmp_path / "o.onnx")
    assert [node.op_type for node in found.graph.node] == ["Unsqueeze", "FusedConv", "Sigmoid"]
    assert counts.nodes(found.graph) == 3
    assert counts.bytes_moved(found) == 2 * 3 * IMAGE
    assert counts.bytes_moved(onnx.load(tmp_path / "m.onnx")) == 4 * 3 * IMAGE


def test_nodes_of_branches_are_counted() -> None:
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    branches = [
        helper.make_graph([helper.make_node(operator, ["x"], ["z"])], "b", [], [value])
        for operator in ("Relu", "Sigmoid")
    ]
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branches[0], else_branch=branches[1])
    assert load("lowering_counts").nodes(graph_of(node, yes=np.array(True)).graph) == 3


def test_the_interval_tells_a_tenth_from_nothing() -> None:
    compare = load("lowering_latency").compare
    random = np.random.default_rng(1)
    disturbed = 1 + random.exponential(0.2, size=(60, 1))  # what disturbs the machine disturbs both
    times = 0.01 * disturbed * (1 + 0.02 * random.standard_normal((60, 2)))
    same, slower = compare(times), compare(times * [1.1, 1.0])
    assert same.low < 1 < same.high
    assert slower.low > 1.03
    assert slower.ratio == pytest.approx(1.1 * same.ratio)
    assert same.runs == 60


def test_both_run_equally_often_and_either_first() -> None:
    latency = load("lowering_latency")
    calls: list[str] = []
    found = latency.interleaved(lambda: calls.append("o"), lambda: calls.append("t"), runs=30)
    timed = "".join(calls[2 * latency.WARM_UP :])
    pairs = [timed[at : at + 2] for at in range(0, len(timed), 2)]
    assert found.runs == len(pairs) == 30
    assert set(pairs) == {"ot", "to"}
    assert latency.interleaved(lambda: None, lambda: None, runs=1, seconds=0.05).runs > 30


def test_the_list_is_long_wide_and_known() -> None:
    models = load("lowering_models")
    register()
    assert len(models.MODELS) >= 24
    assert len(set(models.MODELS.values())) >= 16
    assert set(models.MODELS) <= set(timm.list_models())
    assert models.select([]) == list(models.MODELS)
    assert models.select(["rep*", "resnet18"]) == ["repvit_m0_9", "repvgg_a0", "resnet18"]
    assert models.select([MODEL]) == [MODEL]
    with pytest.raises(UnknownNameError, match="no model 'resnet_18'"):
        models.select(["resnet_18"])


@pytest.mark.slow
def test_it_measures_prints_writes_and_measures_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lowering, results = load("lowering"), load("lowering_results")
    page, cache = tmp_path / "page.md", tmp_path / "cache"
    page.write_text(PAGE)
    given = [MODEL, *QUICK, "--cache", str(cache), "--out", str(page)]
    assert lowering.main(given) == 0
    printed = capsys.readouterr().out
    file = cache / f"{MODEL}.json"
    text = file.read_text()
    figures = json.loads(text)["figures"]
    assert figures["failed"] == {}
    assert all(side > 0 for name in ("nodes", "bytes") for side in figures[name])
    assert figures["difference"] < 1e-5
    assert figures["opsets"] == [20, 20]
    assert figures["latency"]["runs"] == 3
    assert figures["layers"] == [None, None]
    ours, theirs = figures["nodes"]
    assert f"{ours} / {theirs}  {ours / theirs:.3f}" in printed
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert f"| {MODEL} | - | {ours} / {theirs} | {ours / theirs:.3f} |" in written
    assert "latency: geometric mean" in written

    stamped = file.stat().st_mtime_ns
    assert lowering.main(given) == 0
    assert capsys.readouterr().out == printed
    assert file.stat().st_mtime_ns == stamped
    found = json.loads(text)["stamp"]
    assert results.stored(cache, MODEL, found) is not None
    for part, other in (("code", "0"), ("machine", "another"), ("settings", {})):
        assert results.stored(cache, MODEL, {**found, part: other}) is None


@pytest.mark.slow
def test_a_chain_that_fails_is_a_row_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [MODEL, *QUICK, "--opset", "99", "--cache", str(tmp_path)]
    assert load("lowering").main(given) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^{MODEL} +- +failed / \d+ +- +- +- +failed / [\d.]+ +(- +)+-$", printed, re.MULTILINE)
    assert f"{MODEL}: ours: ExportError: opset 99" in printed
    assert re.search(rf"^{MODEL}: theirs: written in opset \d\d$", printed, re.MULTILINE)
    assert "ratio" not in printed.splitlines()[-1] and "mean" not in printed


@pytest.mark.slow
def test_a_process_that_ends_is_a_reason_and_not_stored(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = load("lowering_measure").Settings(0, 0.0, 1, 1, 20, engine=False)
    found = load("lowering_results").measured(tmp_path, "no_such_model", settings, {})
    assert "its process ended with code 1" in found.failed["both"]
    assert "no_such_model" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_graphs_that_differ_give_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = load("lowering_measure")

    def other(model: object, path: Path, opset: int) -> Path:
        """The right chain, then logits that are a hundredth too large."""
        load("lowering_chains").theirs(model, path, opset)
        proto = onnx.load(path)
        (logits,) = (node for node in proto.graph.node if "logits" in node.output)
        logits.output[0] = "before"
        proto.graph.node.append(helper.make_node("Mul", ["before", "scale"], ["logits"]))
        proto.graph.initializer.append(numpy_helper.from_array(np.array(1.01, np.float32), "scale"))
        onnx.save(proto, path)
        return path

    monkeypatch.setattr(measure, "theirs", other)
    found = measure.measure(MODEL, measure.Settings(3, 0.0, 1, 1, 20, engine=False))
    assert re.match(r"ExportError: the logits differ by 9\.9e-03", found.failed["difference"])
    assert (found.nodes, found.bytes, found.latency) == ((None, None), (None, None), None)


def test_the_summary_names_what_misses_its_bound() -> None:
    measure, report, latency = (load(f"lowering_{name}") for name in ("measure", "report", "latency"))
    quick = latency.Latency(0.9, 1.0, 0.9, 0.89, 1.029, 50)
    slow = latency.Latency(1.0, 1.0, 1.0, 0.99, 1.03, 50)
    figures = [
        measure.Figures("a", nodes=(50, 100), layers=(90, 100), bytes=(70, 100), latency=quick),
        measure.Figures("b", nodes=(100, 100), layers=(None, 100), bytes=(80, 100), latency=slow),
    ]
    nodes, layers, moved, times = report.summary(figures)
    assert nodes == "nodes: mean ratio 0.750 over 2 models, within 0.75; the largest 1.000, b"
    assert layers == "layers: mean ratio 0.900 over 1 models, not within 0.75; the largest 0.900, a"
    assert moved.startswith("bytes: mean ratio 0.750 over 2 models, within")
    assert times.startswith("latency: geometric mean 0.949 over 2 models, within 1;")
    assert times.endswith("interval not below 1.03: b (1.030)")
    assert report.line(figures[1])[4:6] == ["failed / 100", "-"]


@pytest.mark.slow
@pytest.mark.engine
def test_layers_are_counted_where_the_engine_is(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    measure = load("lowering_measure")
    found = measure.measure(MODEL, measure.Settings(0, 0.0, 1, 1, 20, engine=True))
    assert found.failed == {}
    assert all(side > 0 for side in found.layers)
    assert found.latency is None


def test_what_cannot_be_is_said_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lowering = load("lowering")
    page = tmp_path / "page.md"
    page.write_text("no place here\n")
    assert lowering.main([MODEL, "--skip-engine", "--out", str(page), "--cache", str(tmp_path / "c")]) == 1
    assert "needs one line '<!-- lowering: begin -->'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        lowering.main([MODEL, "--runs", "0"])
    assert "--runs 0: must be 1 or more" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.slow
def test_scaling_prints_seconds_beside_the_smallest(capsys: pytest.CaptureFixture[str]) -> None:
    scaling = load("lowering_scaling")
    small, large = scaling.Cost(100, 2.0, 0.1, 10**9), scaling.Cost(1000, 30.0, 5.0, 4 * 10**9)
    rows = scaling.lines([("large", large), ("small", small), ("huge", "wants more than 20 GB")])
    assert rows[0] == ["large", "1000", "30.0 s", "30.00", "1.50", "5.0 s", "4.0 GB"]
    assert rows[1][3:5] == ["20.00", "1.00"]
    assert rows[2][:2] == ["huge", "wants more than 20 GB"]
    assert scaling.main([MODEL]) == 0
    assert re.search(
        rf"^{MODEL} +\d+ +[\d.]+ s +[\d.]+ +1\.00 +[\d.]+ s +[\d.]+ GB$", capsys.readouterr().out, re.M
    )


def test_speed_is_the_inverse_of_time() -> None:
    latency = load("lowering_latency").Latency(0.8, 1.0, 0.8, 0.5, 1.0, 50)
    cells = load("riformer_speed").line("torch", latency)
    assert cells == ("torch", "800.0 ms", "1000.0 ms", "+25.0 %", "+0.0 to +100.0 %")


@pytest.mark.slow
def test_riformer_is_faster_than_poolformer(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("riformer_speed").main(["--batch", "2", "--runs", "5"]) == 0
    printed = capsys.readouterr().out
    assert "+17.8 %" in printed
    assert len(re.findall(r"^(?:ONNX Runtime|torch) +[\d.]+ ms +[\d.]+ ms +\+", printed, re.MULTILINE)) == 2
