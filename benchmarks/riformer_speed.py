"""RIFormer-S12 beside PoolFormer-S12, both lowered: how much faster it is here, and in the paper.

    python benchmarks/riformer_speed.py [--runs 50] [--batch 8] [--threads 1]

RIFormer (Wang et al., 2023) is PoolFormer without its pooling; the paper has it 17.8 % faster on an A100. The
two take turns in random order, in ONNX Runtime and in torch; weights are random, which changes no speed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lowering_latency import Latency, interleaved
from lowering_models import build
from lowering_runtime import ready

import vmkd_fx as vx
from vmkd_fx.table import table

MODELS = ("riformer_s12", "poolformer_s12")
HEADER = ("runtime", "RIFormer-S12", "PoolFormer-S12", "faster by", "95 % interval")
PAPER = ("an A100, in the paper", "", "", "+17.8 %", "")


def in_torch(name: str, batch: int) -> Callable[[], object]:
    """A run of the lowered model in torch."""
    model = vx.lower(build(name), "torch")
    images = torch.randn(batch, *model.info.need_input_size())

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(images)

    return run


def in_onnxruntime(name: str, batch: int, threads: int, folder: Path) -> Callable[[], object]:
    """A run of the lowered model in ONNX Runtime."""
    path = folder / f"{name}.onnx"
    vx.export(vx.lower(build(name), "onnxruntime"), path)
    return ready(path, batch, threads)


def line(runtime: str, found: Latency) -> tuple[str, ...]:
    """The cells of one runtime; speed is images a second, so its gain is the inverse of the times' ratio."""
    gain, low, high = (100 * (1 / ratio - 1) for ratio in (found.ratio, found.high, found.low))
    times = (f"{1000 * seconds:.1f} ms" for seconds in (found.ours, found.theirs))
    return runtime, *times, f"{gain:+.1f} %", f"{low:+.1f} to {high:+.1f} %"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="RIFormer-S12 beside PoolFormer-S12")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(given)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        sessions = [in_onnxruntime(name, args.batch, args.threads, Path(folder)) for name in MODELS]
        rows = [line("ONNX Runtime", interleaved(*sessions, args.runs))]
    rows.append(line("torch", interleaved(*(in_torch(name, args.batch) for name in MODELS), args.runs)))
    print(table(HEADER, [*rows, PAPER], right=HEADER[1:]))
    print(f"batch {args.batch}, {args.threads} thread(s), {args.runs} pairs, medians")
    return 0


if __name__ == "__main__":
    sys.exit(main())
