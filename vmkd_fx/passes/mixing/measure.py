"""Time realisations on this machine: in torch, or in ONNX Runtime as the small graph that each becomes.

Repetitions are interleaved, so that whatever else the machine does falls on all candidates alike.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmkd_fx.errors import BuildError
from vmkd_fx.extras import require
from vmkd_fx.passes.mixing.problem import Problem, Realisation
from vmkd_fx.timing import in_turns, seconds_of

Translations = Mapping[Callable[..., Any], Callable[..., Any]]

_LEFT_BEHIND = 20.0
"""A candidate that takes so many times the fastest one's first call is not called again."""


class Alone(nn.Module):
    """One realisation with its constants, in float32: x (B, *grid, C) to the same shape."""

    def __init__(self, realisation: Realisation, kernel: Tensor) -> None:
        super().__init__()
        self.realisation = realisation
        self.count = 0
        for constant in realisation.prepare(kernel.double()):
            self.register_buffer(f"constant_{self.count}", constant.float())
            self.count += 1

    def forward(self, x: Tensor) -> Tensor:
        constants = (getattr(self, f"constant_{index}") for index in range(self.count))
        return self.realisation.apply(x, *constants)


def measure(
    problem: Problem,
    kind: str,
    candidates: Sequence[Realisation],
    translations: Translations | None = None,
    device: str = "cpu",
    seconds: float = 3.0,
) -> dict[str, float]:
    """Median seconds of a call, by name, the fastest first.

    Args:
        problem: also says the batch.
        kind: "torch" or "onnxruntime".
        candidates: realisations of the problem.
        translations: what the export needs for our own operators (`vmkd_fx.deploy.onnx_operators`); without
            it a candidate with such an operator is left out.
        device: for torch; ONNX Runtime is timed on the CPU.
        seconds: about how long all repetitions take, the preparation not counted.

    Raises:
        BuildError: the kind cannot be timed here.
        MissingExtraError: onnxruntime is not installed.
    """
    if kind not in ("torch", "onnxruntime"):
        raise BuildError(
            f"realisations for {kind} are chosen by the cost model: an engine a candidate would have to be "
            "built to time them; torch and onnxruntime are measured"
        )
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(problem.groups, *problem.grid, dtype=torch.float64, generator=generator)
    x = torch.randn(problem.batch, *problem.grid, problem.channels, generator=generator)
    calls: dict[str, Callable[[], object]] = {}
    for candidate in candidates:
        module = Alone(candidate, kernel).eval()
        if kind == "torch":
            calls[candidate.name] = torch_call(module.to(device), x.to(device))
        elif translations is not None or "vmkd" not in _operators(candidate):
            calls[candidate.name] = onnx_call(module, x, translations or {})
    medians = interleaved(calls, seconds)
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each call. Each is called once to warm up; a very slow one keeps that time."""
    first = {name: seconds_of(call) for name, call in calls.items()}
    limit = _LEFT_BEHIND * min(first.values(), default=0.0)
    kept = {name: call for name, call in calls.items() if first[name] <= limit}
    times = in_turns(kept, turns=5, seconds=seconds, most=200)
    return {name: float(np.median(times[name])) if name in times else first[name] for name in calls}


def torch_call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """A call in torch that returns when the device is done."""

    @torch.inference_mode()
    def call() -> None:
        module(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return call


def onnx_call(module: nn.Module, x: Tensor, translations: Translations) -> Callable[[], object]:
    """A call in ONNX Runtime on the CPU."""
    runtime = require("onnxruntime", "onnxruntime", "timing in ONNX Runtime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    # Idle threads that spin would slow the candidates that run in turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = to_onnx(module, x, translations)
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def to_onnx(module: nn.Module, x: Tensor, translations: Translations) -> bytes:
    """The module as an ONNX file for any batch, x (B, ...)."""
    with _silence():
        program = torch.onnx.export(
            module,
            (x[:1].expand(2, *x.shape[1:]).contiguous(),),
            dynamo=True,
            opset_version=20,
            input_names=["x"],
            output_names=["y"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table=dict(translations),
            verbose=False,
        )
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    return data


def _operators(candidate: Realisation) -> str:
    """The names of the operators that a realisation calls, joined."""
    return " ".join(type(candidate).apply.__code__.co_names)


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing printed, warned or logged by the exporter."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
