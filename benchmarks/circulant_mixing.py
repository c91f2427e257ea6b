"""Circulant mixing, every realisation side by side in one run: what the compiler chooses and what it gains.

    python benchmarks/circulant_mixing.py [--tokens 196 784 3136 12544] [--batch 1] [--seconds 10] [--engine]

G = 8 groups; channels shrink as tokens grow, as in a pyramid. Repetitions are interleaved and the figures are
medians; ratios are of one run. "measured" was chosen from a first round of times and is judged by a second.
Realisations whose cost the model puts at over 100 times the best are left out, and named.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vmkd_fx.deploy.onnx_operators import translations
from vmkd_fx.passes.circulant_mixer import spectra
from vmkd_fx.passes.mixing.choose import candidates, choose, predicted, refusals
from vmkd_fx.passes.mixing.measure import Alone, interleaved, onnx_call, to_onnx, torch_call
from vmkd_fx.passes.mixing.problem import Problem, Realisation
from vmkd_fx.table import table

CHANNELS = {196: 768, 784: 384, 3136: 192, 12544: 96}
GROUPS = 8
PAPER = "paper's Algorithm 1"


class PaperMixing(torch.nn.Module):
    """CCS Algorithm 1: complex transforms, that of the weight in every call too."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        groups = self.weight.shape[0]
        maps, response = spectra(x, self.weight)
        response = response.T[None, :, None, :].expand(batch, tokens, channels // groups, groups)
        return torch.fft.fft(maps * response.reshape(batch, tokens, channels), dim=1).real


def calls_of(
    problem: Problem, kind: str, chosen: list[Realisation], kernel: Tensor, x: Tensor
) -> dict[str, Callable[[], object]]:
    """What is timed, by name; in torch the paper's algorithm among it."""
    calls = {}
    for one in chosen:
        module = Alone(one, kernel).eval()
        calls[one.name] = torch_call(module, x) if kind == "torch" else onnx_call(module, x, translations())
    if kind == "torch":
        calls[PAPER] = torch_call(PaperMixing(kernel.float()), x)
    return calls


def compare(problem: Problem, kind: str, seconds: float) -> None:
    """Print the times of one problem on one runtime, and the ratios that matter."""
    known = candidates(problem, kind)
    best = predicted(known[0], kind)
    wanted = [one for one in known if predicted(one, kind) < 100 * best or one.name in ("dense", "onnx-dft")]
    wanted = [one for one in wanted if predicted(one, kind) < 2]
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(problem.groups, *problem.grid, dtype=torch.float64, generator=generator)
    x = torch.randn(problem.batch, *problem.grid, problem.channels, generator=generator)
    calls = calls_of(problem, kind, wanted, kernel, x)
    tuning = interleaved(calls, seconds)
    by_model = choose(problem, kind)[0].name
    ours = {name: time for name, time in tuning.items() if name != PAPER}
    by_measure = choose(problem, kind, measured=ours)[0].name
    times = interleaved(calls, seconds)
    fastest = min(time for name, time in times.items() if name != PAPER)
    marks = {by_model: "model", by_measure: "measured"}
    if by_model == by_measure:
        marks = {by_model: "model, measured"}
    rows = [
        (name, f"{1e3 * times[name]:.3f}", f"{times[name] / fastest:.2f}", marks.get(name, ""))
        for name in sorted(times, key=lambda name: times[name])
    ]
    print(f"\nN={problem.tokens} C={problem.channels} G={problem.groups} batch {problem.batch}, {kind}")
    print(table(("realisation", "ms", "of the best", "chosen by"), rows, right=("ms", "of the best")))
    for label, rival in (("paper", PAPER), ("ONNX DFT", "onnx-dft"), ("dense", "dense")):
        if rival in times:
            print(f"{label} / auto: {times[rival] / times[by_measure]:.2f}")
    print(f"auto / best: measured {times[by_measure] / fastest:.3f}, model {times[by_model] / fastest:.3f}")
    for one in known:
        if one not in wanted:
            print(f"left out: {one.name}, {predicted(one, kind) / best:.0f} times the best by the model")
    for name, reason in refusals(problem, kind).items():
        print(f"refused: {name}: {reason}")


def build_engines(problem: Problem) -> None:
    """Build each realisation that fits with TensorRT-RTX, which needs no GPU for it."""
    from vmkd_fx.deploy.engine import build

    kernel = torch.randn(problem.groups, *problem.grid, dtype=torch.float64)
    x = torch.randn(2, *problem.grid, problem.channels)
    for one in candidates(problem, "tensorrt-rtx", each=1):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.onnx"
            path.write_bytes(to_onnx(Alone(one, kernel).eval(), x, translations()))
            step = build(path, target="tensorrt-rtx:sm89", progress=False)
        print(f"{problem.grid} {one.name}: {step.detail}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=list(CHANNELS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--engine", action="store_true")
    given = parser.parse_args()
    for tokens in given.tokens:
        problem = Problem((tokens,), CHANNELS.get(tokens, 96), GROUPS, given.batch)
        if given.engine:
            build_engines(problem)
            continue
        for kind in ("torch", "onnxruntime"):
            compare(problem, kind, given.seconds)
    if given.engine:
        build_engines(Problem((14, 14), 96, 96, given.batch))


if __name__ == "__main__":
    main()
